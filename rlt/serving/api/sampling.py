"""Routes of samplers, and the one request that is not a model's."""

import time
from typing import Any

from fastapi import APIRouter, Request

from rlt.errors import Refused
from rlt.serving.api.asking import Body, Serving, Tenant
from rlt.serving.api.training import answered
from rlt.serving.database import samplers
from rlt.serving.kinds import dump
from rlt.serving.requests.rows import Submission
from rlt.serving.service import Service
from rlt.serving.sessions import lives
from rlt.serving.sessions.checkpoints import find, parse_path
from rlt.wire import form, json_form
from rlt.wire.form import text, text_or_none, whole

router = APIRouter()
NUMBERS_OF_SAMPLERS = 2**62


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request, service: Serving, tenant: Tenant) -> dict[str, str]:
    body = form.parse(await request.body())
    session_id, base_model, path = text(body, "session_id"), text_or_none(body, "base_model"), body.get("model_path")
    await service.database.run(lives.living, session_id, tenant)
    number = whole(body.get("sampling_session_seq_id"), "sampling_session_seq_id", most=NUMBERS_OF_SAMPLERS)
    row: dict[str, Any] = {"id": lives.sampler_id_of(session_id, number), "tenant": tenant, "session_id": session_id}
    if path is not None:
        row |= await _of_weights(service, tenant, path)
    elif base_model is None:
        raise Refused("give model_path, the path of weights to sample from, or base_model")
    else:
        service.check_base_model(base_model)
        row["base_model"] = base_model
    await service.database.run(lives.add_sampler, row, time.time())
    return {"type": "create_sampling_session", "sampling_session_id": row["id"]}


async def _of_weights(service: Service, tenant: str, path: Any) -> dict[str, Any]:
    place = parse_path(path)
    if place.kind != "sampler_weights":
        raise Refused(f"{place.path} is a training state: sample from a path with /sampler_weights/")
    saved = await service.database.run(find, place.path, tenant, reading=True)
    return {"base_model": saved.base_model, "model_path": saved.path, "address": saved.address}


@router.post("/join_sampling_session")
async def join_sampling_session(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    """Another client of a sampler, told which numbers are its own: those that begin with its counter."""
    counter = await service.database.run(lives.join_sampler, text(body, "sampling_session_id"), tenant)
    return {"type": "join_sampling_session", "client_counter": counter}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, service: Serving, tenant: Tenant) -> dict[str, Any]:
    row = await service.database.run(lives.owned, samplers, sampler_id, tenant, "sampler")
    place = service.settings.base_models.get(row.base_model)
    name = place.tokenizer if place and place.tokenizer else row.base_model  # clients load a tokenizer by it
    return {"sampler_id": row.id, "base_model": name, "model_path": row.model_path}


@router.post("/asample")
async def asample(request: Request, service: Serving, tenant: Tenant) -> dict[str, Any]:
    body = form.parse(await request.body())
    sampler_id, seq_id = json_form.read_sample_place(body)
    sampler = await service.database.run(lives.living_sampler, sampler_id, tenant)

    def work() -> bytes:
        asked = json_form.read_sample_request(body, service.settings.limits)
        place = service.settings.base_models.get(sampler.base_model)
        length = asked.prompt.size + (asked.params.max_tokens or 1)
        if place is not None and length > place.context:
            raise Refused(
                f"prompt and max_tokens are {length} tokens, the context of {sampler.base_model} is {place.context}: "
                "shorten the prompt or lower max_tokens"
            )
        return dump(body)

    payload, refusal = answered(work)
    asked = Submission(tenant, sampler.session_id, "sample", sampler_id, seq_id, payload, {}, refusal)
    request_id = await service.submit(asked)
    count = body.get("num_samples", 1)
    names = [f"{sampler_id}:{seq_id}:{number}" for number in range(count if payload else 1)]
    return {"request_id": request_id, "sample_sequence_ids": names}
