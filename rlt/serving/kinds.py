"""What each kind of request needs before it is executed, and what its answer changes in the tables."""

import json
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from rlt.errors import Refused
from rlt.serving.database import checkpoints, metrics, models, requests, samplers, sessions
from rlt.serving.errors import Gone, Missing
from rlt.serving.requests.order import Kind
from rlt.serving.requests.rows import WAITING
from rlt.serving.sessions.checkpoints import Place, check_free, find, record
from rlt.serving.sessions.lives import add_sampler
from rlt.wire import protobuf

ADAPTER_FIELDS = ("rank", "seed", "train_mlp", "train_attn", "train_unembed")


def dump(form: Mapping[str, Any]) -> bytes:
    return json.dumps(form).encode()


def model_of(connection: Connection, row: Row) -> Row:
    """The model that a request is for, once it was made."""
    model = connection.execute(select(models).where(models.c.id == row.lane)).one()
    if model.unloaded:
        raise Gone(f"the model {row.lane} is no longer there")
    if not model.ready:
        raise Refused(f"the model {row.lane} could not be made: see the error of the request that asked for it")
    return model


def _trained(connection: Connection, row: Row) -> bytes | None:
    model_of(connection, row)
    return row.payload


def _to_create(connection: Connection, row: Row) -> bytes:
    """Of a checkpoint, which may have been saved since the request came."""
    form = json.loads(row.payload)
    if path := row.details.get("path"):
        saved, asked = find(connection, path, row.tenant, reading=True), row.details.get("base_model")
        if asked not in (None, saved.base_model):
            raise Refused(f"{path} is of {saved.base_model}, and {asked} was asked for")
        form |= {"base_model": saved.base_model, "adapter": saved.adapter, "address": saved.address}
        change = {"base_model": saved.base_model, "adapter": saved.adapter}
        connection.execute(update(models).where(models.c.id == row.lane).values(change))
    return dump(form)


def _created(connection: Connection, row: Row, _: bytes) -> bytes:
    connection.execute(update(models).where(models.c.id == row.lane).values(ready=True))
    return dump({"type": row.details["type"], "model_id": row.lane, "path": row.details.get("path")})


def _to_save(connection: Connection, row: Row) -> bytes:
    model_of(connection, row)
    if name := row.details.get("name"):
        check_free(connection, Place(row.lane, row.details["kind"], name).path, row.details["overwrite"])
    return row.payload


def _saved(connection: Connection, row: Row, result: bytes) -> bytes:
    details, size = row.details, json.loads(result)["size_bytes"]
    model, address = model_of(connection, row), json.loads(row.payload)["address"]
    if details.get("name") is None:
        return _sampler_saved(connection, row, model, address)
    place = Place(row.lane, details["kind"], details["name"])
    saved = {name: details[name] for name in ("expires", "user_metadata")}
    record(connection, place, model, saved | {"address": address, "size_bytes": size})
    return dump({"type": row.kind, "path": place.path, "size_bytes": size})


def _sampler_saved(connection: Connection, row: Row, model: Row, address: str) -> bytes:
    """Unnamed weights: nothing lists them, and they are gone with their session."""
    inflight = row.details["inflight"]
    if inflight:
        connection.execute(update(models).where(models.c.id == model.id).values(inflight_address=address))
    sampler = {"id": row.details["sampler_id"], "tenant": row.tenant, "session_id": row.session_id, "address": address}
    sampler |= {"base_model": model.base_model, "model_id": model.id, "inflight": inflight}
    add_sampler(connection, sampler, row.created)
    return dump({"type": row.kind, "sampling_session_id": sampler["id"]})


def _to_load(connection: Connection, row: Row) -> bytes:
    model, saved = model_of(connection, row), find(connection, row.details["path"], row.tenant, reading=True)
    if saved.base_model != model.base_model:
        raise Refused(f"{saved.path} is of {saved.base_model}, the model is of {model.base_model}")
    ours, theirs = ({name: each.adapter[name] for name in ADAPTER_FIELDS if name != "seed"} for each in (model, saved))
    if ours != theirs:
        raise Refused(f"{saved.path} is an adapter of {theirs}, the model's is of {ours}")
    return dump(json.loads(row.payload) | {"address": saved.address})


def _loaded(connection: Connection, row: Row, _: bytes) -> bytes:
    return dump({"type": "load_weights", "path": row.details["path"], "model_id": row.lane})


def _to_sample(connection: Connection, row: Row) -> bytes:
    sampler = connection.execute(select(samplers).where(samplers.c.id == row.lane)).one_or_none()
    if sampler is None:
        raise Missing(f"the sampler {row.lane} is no longer there")
    address = sampler.address
    if sampler.inflight:
        address = connection.execute(
            select(models.c.inflight_address).where(models.c.id == sampler.model_id)
        ).scalar_one()
    return dump(json.loads(row.payload) | {"address": address, "base_model": sampler.base_model})


def _unloaded(connection: Connection, row: Row, _: bytes) -> bytes:
    connection.execute(update(models).where(models.c.id == row.lane).values(unloaded=True))
    return dump({"type": "unload_model", "model_id": row.lane})


def _note(connection: Connection, row: Row, figures: Mapping[str, Any]) -> None:
    finite = {name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}
    this = (metrics.c.model_id == row.lane) & (metrics.c.seq_id == row.seq_id)
    connection.execute(delete(metrics).where(this))
    connection.execute(insert(metrics).values(model_id=row.lane, seq_id=row.seq_id, kind=row.kind, figures=finite))


def _passed(connection: Connection, row: Row, result: bytes) -> bytes:
    _note(connection, row, protobuf.read_metrics(result) | {"tokens": row.details.get("tokens", 0)})
    return result


def _stepped(connection: Connection, row: Row, result: bytes) -> bytes:
    form = json.loads(result)
    _note(connection, row, form["metrics"])
    return dump({"type": row.kind, **form})


def _tokens_read(row: Row, _: bytes) -> int:
    return row.details.get("tokens", 0)


def _tokens_made(row: Row, result: bytes) -> int:
    return sum(each.tokens.size for each in protobuf.read_sample(result).sequences)


SAVE = Kind(prepare=_to_save, complete=_saved)
KINDS = {
    "create_model": Kind(changes_model=True, prepare=_to_create, complete=_created),
    "forward_backward": Kind(
        protobuf=True, changes_model=True, prepare=_trained, complete=_passed, tokens=_tokens_read
    ),
    "forward": Kind(protobuf=True, prepare=_trained, tokens=_tokens_read),
    # A step whose gradients are not finite fails, and drops them.
    "optim_step": Kind(changes_model=True, changes_by_failing=True, prepare=_trained, complete=_stepped),
    "load_weights": Kind(changes_model=True, prepare=_to_load, complete=_loaded),
    "save_weights": SAVE,
    "save_weights_for_sampler": SAVE,
    "save_weights_external": SAVE,
    "save_weights_merged": SAVE,
    "embed": Kind(protobuf=True, prepare=_trained),
    "sample": Kind(protobuf=True, ordered=False, prepare=_to_sample, tokens=_tokens_made),
    "unload_model": Kind(complete=_unloaded),
}
CHANGING = tuple(name for name, kind in KINDS.items() if kind.changes_model)


def addresses(connection: Connection) -> set[str]:
    """All that something refers to, what waiting requests are to write included."""
    found: set[str | None] = set(connection.execute(select(checkpoints.c.address)).scalars())
    alive = models.c.session_id.in_(select(sessions.c.id).where(sessions.c.ended.is_(None)))
    found |= set(connection.execute(select(samplers.c.address)).scalars())
    found |= set(connection.execute(select(models.c.kept_address).where(models.c.unloaded.is_(False))).scalars())
    found |= set(connection.execute(select(models.c.inflight_address).where(alive)).scalars())
    waiting = select(requests.c.details).where(requests.c.state == WAITING)
    found |= {details.get("address") for details in connection.execute(waiting).scalars()}
    return {address for address in found if address}
