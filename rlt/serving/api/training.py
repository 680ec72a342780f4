"""Routes of models: make, read data, step, save, load. All but two answer with the id of a request to poll for."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Row

from rlt.errors import Refused
from rlt.serving.api.asking import Body, Serving, Tenant, sends_protobuf
from rlt.serving.database import models
from rlt.serving.errors import Missing
from rlt.serving.kinds import ADAPTER_FIELDS, dump
from rlt.serving.requests.rows import Submission
from rlt.serving.service import Service
from rlt.serving.sessions import lives
from rlt.serving.sessions.checkpoints import check_name, check_ttl, find, parse_path
from rlt.wire import form, json_form, protobuf
from rlt.wire.form import flag, text, text_or_none, whole
from rlt.wire.values import ForwardBackwardRequest, Limits

router = APIRouter()
RANKS = (1, 1024)
NUMBERS_OF_MODELS = 2**31


def read_adapter(given: Any) -> dict[str, Any]:
    adapter = form.mapping(given or {}, "lora_config")
    seed = adapter.get("seed")
    read = {name: flag(adapter, name, True) for name in ("train_mlp", "train_attn", "train_unembed")}
    if not any(read.values()):
        raise Refused("train_mlp, train_attn and train_unembed are all false: nothing would be trained")
    rank = adapter.get("rank", 32)
    rank = None if rank is None else whole(rank, "rank", *RANKS)  # null: all weights are trained
    return {"rank": rank, "seed": None if seed is None else whole(seed, "seed"), **read}


def check_optimizer(body: Mapping[str, Any]) -> None:
    kind = form.mapping(body.get("optimizer_config") or {}, "optimizer_config").get("type", "adamw")
    if kind != "adamw":
        raise Refused(f"the optimizer {kind!r} is not known here: adamw is")


def answered(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it made, or why it refused: a request that is refused keeps its number all the same."""
    try:
        return work(), None
    except Refused as error:
        return None, str(error)


async def submit_training(
    service: Service, model: Row, kind: str, seq_id: int, work: Callable[[], tuple[bytes, dict[str, Any]]]
) -> dict[str, str]:
    made, refusal = answered(work)
    payload, details = made or (None, {})
    asked = Submission(model.tenant, model.session_id, kind, model.id, seq_id, payload, details, refusal)
    return {"request_id": await service.submit(asked), "model_id": model.id}


async def model_asked(service: Service, tenant: str, body: Mapping[str, Any]) -> tuple[Row, int]:
    model_id, seq_id = json_form.read_place(body)
    return await service.database.run(lives.living_model, model_id, tenant, time.time()), seq_id


async def _add_model(service: Service, tenant: str, body: Mapping[str, Any], base_model: str, adapter: Any) -> Row:
    session_id = text(body, "session_id")
    session = await service.database.run(lives.living, session_id, tenant)
    model_id = lives.model_id_of(session_id, whole(body.get("model_seq_id"), "model_seq_id", most=NUMBERS_OF_MODELS))
    row = {"id": model_id, "tenant": tenant, "session_id": session_id, "project_id": session.project_id}
    row |= {"base_model": base_model, "adapter": adapter, "user_metadata": form.texts_or_none(body, "user_metadata")}
    await service.database.run(lives.add_model, row, time.time())
    return await service.database.run(lives.owned, models, model_id, tenant, "model")


NO_ADAPTER = dict.fromkeys(ADAPTER_FIELDS)


@router.post("/create_model")
async def create_model(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    base_model = text(body, "base_model")
    adapter, refusal = answered(lambda: read_adapter(body.get("lora_config")))

    def work() -> tuple[bytes, dict[str, Any]]:
        if refusal:
            raise Refused(refusal)
        check_optimizer(body)
        service.check_base_model(base_model)
        return dump({"base_model": base_model, "adapter": adapter}), {"type": "create_model"}

    model = await _add_model(service, tenant, body, base_model, adapter or NO_ADAPTER)
    return await submit_training(service, model, "create_model", 0, work)


@router.post("/get_info")
async def get_info(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    model = await service.database.run(lives.owned, models, text(body, "model_id"), tenant, "model")
    place = service.settings.base_models.get(model.base_model)
    data = {"arch": "unknown", "model_name": model.base_model}
    if place is not None and place.tokenizer:
        data["tokenizer_id"] = place.tokenizer
    rank = model.adapter["rank"]
    named = {"model_id": model.id, "model_data": data, "model_name": model.base_model}
    return {"type": "get_info", **named, "is_lora": rank is not None, "lora_rank": rank or 0}


def _read_batch(limits: Limits, raw: bytes, body: Any, key: str) -> tuple[bytes, ForwardBackwardRequest]:
    """Whatever form it came in, it is kept and executed as protobuf."""
    if body is None:
        return raw, protobuf.read_request(raw, limits)
    request = json_form.read_request(body, key, limits)
    return protobuf.write_request(request), request


async def _submit_batch(request: Request, service: Service, tenant: str, key: str) -> dict[str, str]:
    raw = await request.body()
    packed = sends_protobuf(request)
    body = None if packed else await asyncio.to_thread(form.parse, raw)
    place = await asyncio.to_thread(protobuf.read_place, raw) if packed else json_form.read_place(body)
    model = await service.database.run(lives.living_model, place[0], tenant, time.time())
    limits = service.settings.limits
    read, refusal = await asyncio.to_thread(answered, lambda: _read_batch(limits, raw, body, key))
    kind = "forward" if read and read[1].forward_only else "forward_backward"

    def work() -> tuple[bytes, dict[str, Any]]:
        if read is None:
            raise Refused(refusal)
        return read[0], {"tokens": sum(datum.tokens.size for datum in read[1].data)}

    return await submit_training(service, model, kind, place[1], work)


@router.post("/forward_backward")
async def forward_backward(request: Request, service: Serving, tenant: Tenant) -> dict[str, str]:
    return await _submit_batch(request, service, tenant, "forward_backward_input")


@router.post("/forward")
async def forward(request: Request, service: Serving, tenant: Tenant) -> dict[str, str]:
    return await _submit_batch(request, service, tenant, "forward_input")


@router.post("/optim_step")
async def optim_step(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    model, seq_id = await model_asked(service, tenant, body)

    def work() -> tuple[bytes, dict[str, Any]]:
        if other := body.get("optimizer_params"):
            kind = other.get("type") if isinstance(other, dict) else other
            raise Refused(f"the optimizer {kind!r} is not known here: adam_params are read")
        json_form.read_adam(body.get("adam_params") or {})
        return dump({"adam_params": body.get("adam_params") or {}}), {}

    return await submit_training(service, model, "optim_step", seq_id, work)


def named(service: Service, body: Mapping[str, Any], kind: str, name: Any) -> tuple[bytes, dict[str, Any]]:
    ttl, address = check_ttl(body.get("ttl_seconds")), service.storage.new_address()
    details = {"kind": kind, "name": check_name(name), "overwrite": flag(body, "overwrite", False)}
    details |= {
        "expires": None if ttl is None else time.time() + ttl,
        "user_metadata": form.texts_or_none(body, "user_metadata"),
    }
    if body.get("age_encryption_recipients"):
        raise Refused("age_encryption_recipients: files are not encrypted here, leave it out")
    return dump({"address": address}), details | {"address": address}


@router.post("/save_weights")
async def save_weights(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    model, seq_id = await model_asked(service, tenant, body)
    name = body.get("path") if body.get("path") is not None else f"{seq_id:06d}"
    return await submit_training(service, model, "save_weights", seq_id, lambda: named(service, body, "weights", name))


@router.post("/save_weights_external")
async def save_weights_external(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    model, seq_id = await model_asked(service, tenant, body)

    def work() -> tuple[bytes, dict[str, Any]]:
        return named(service, body, "external_weights", body.get("path"))

    return await submit_training(service, model, "save_weights_external", seq_id, work)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    model, seq_id = await model_asked(service, tenant, body)

    def work() -> tuple[bytes, dict[str, Any]]:
        if body.get("path") is not None:
            return named(service, {**body, "overwrite": True}, "sampler_weights", body["path"])
        number = whole(body.get("sampling_session_seq_id"), "sampling_session_seq_id")
        address = service.storage.new_address()
        details = {
            "sampler_id": lives.sampler_id_of(model.session_id, number),
            "inflight": body.get("kind") == "inflight",
        }
        return dump({"address": address}), details | {"address": address}

    return await submit_training(service, model, "save_weights_for_sampler", seq_id, work)


def _state_path(body: Mapping[str, Any]) -> str:
    place = parse_path(body.get("path"))
    if place.kind != "weights":
        raise Refused(f"{place.path} can be sampled from, not trained on: load a path with /weights/")
    return place.path


@router.post("/load_weights")
async def load_weights(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    """Into a model that is there, or, with a session's number, into a new one."""
    if body.get("model_id") is None:
        return await _create_from_weights(service, tenant, body)
    model, seq_id = await model_asked(service, tenant, body)

    def work() -> tuple[bytes, dict[str, Any]]:
        return dump({"optimizer": flag(body, "optimizer", False)}), {"path": _state_path(body)}

    return await submit_training(service, model, "load_weights", seq_id, work)


async def _create_from_weights(service: Service, tenant: str, body: Mapping[str, Any]) -> dict[str, str]:
    base_model = text_or_none(body, "base_model")

    def work() -> tuple[bytes, dict[str, Any]]:
        check_optimizer(body)
        details = {"type": "load_weights", "path": _state_path(body), "base_model": base_model}
        return dump({"optimizer": flag(body, "optimizer", False)}), details

    # What the checkpoint is of becomes known when it is loaded.
    model = await _add_model(service, tenant, body, base_model or "unknown", NO_ADAPTER)
    return await submit_training(service, model, "create_model", 0, work)


@router.post("/unload_model")
async def unload_model(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    """Without a number of its own: it comes after all that was sent before."""
    model = await service.database.run(lives.owned, models, text(body, "model_id"), tenant, "model")
    seq_id = body.get("seq_id")
    number = await service.requests.last_number(model.id) + 1 if seq_id is None else whole(seq_id, "seq_id")
    return await submit_training(service, model, "unload_model", number, lambda: (b"{}", {}))


@router.post("/create_custom_loss")
async def create_custom_loss(tenant: Tenant) -> None:
    raise Missing("losses of clients are computed by clients: forward_backward_custom of the SDK does it without this")


@router.post("/weights_info")
async def weights_info(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    row = await service.database.run(find, parse_path(body.get("tinker_path")).path, tenant, reading=True)
    adapter = json.loads(json.dumps(row.adapter))
    rank = adapter.pop("rank")
    adapter.pop("seed")
    return {"base_model": row.base_model, "is_lora": rank is not None, "lora_rank": rank, **adapter}
