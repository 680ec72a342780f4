"""Checkpoints under a second path: the files are shared, and stay as long as one of the paths does."""

import time
import uuid
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from rlt.errors import Refused
from rlt.serving.database import checkpoints, models
from rlt.serving.sessions.checkpoints import Place, find
from rlt.serving.sessions.lives import living, model_id_of


@dataclass(frozen=True)
class Destination:
    """A session and a number in it, or a project."""

    tenant: str
    project: str | None
    session_id: str | None
    number: int | None


def copy(connection: Connection, source: str, to: Destination, expires: float | None) -> str:
    """The copy's path. It belongs to a training run of its own, which cannot be trained on; asked for again with the
    same session and number, it is the same."""
    saved = find(connection, source, to.tenant, reading=True)
    project, run_id = to.project, f"copy-{uuid.uuid4().hex[:16]}:train:0"
    session_id = run_id.partition(":")[0]
    if to.session_id is not None and to.number is not None:
        session_id = to.session_id
        project, run_id = living(connection, session_id, to.tenant).project_id, model_id_of(session_id, to.number)
    place = Place(run_id, saved.kind, saved.name)
    if connection.execute(select(models.c.id).where(models.c.id == run_id)).one_or_none():
        _check_same(connection, place, saved.address)
        return place.path
    now = time.time()
    run = {"id": run_id, "tenant": to.tenant, "session_id": session_id, "project_id": project, "created": now}
    run |= {"base_model": saved.base_model, "adapter": saved.adapter, "used": now, "ready": True, "unloaded": True}
    connection.execute(insert(models).values(run))
    row = {name: getattr(saved, name) for name in ("kind", "name", "base_model", "adapter", "address", "size_bytes")}
    row |= {"path": place.path, "tenant": to.tenant, "model_id": run_id, "created": now, "expires": expires}
    connection.execute(insert(checkpoints).values(row | {"user_metadata": saved.user_metadata}))
    return place.path


def _check_same(connection: Connection, place: Place, address: str) -> None:
    before = connection.execute(select(checkpoints.c.address).where(checkpoints.c.path == place.path))
    if before.scalar_one_or_none() != address:
        raise Refused(f"there is a training run {place.model_id} already: take another model_seq_id")
