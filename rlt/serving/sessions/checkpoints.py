"""What was saved under a name: `tinker://{model}/{kind}/{name}`, and what becomes of it."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update

from rlt.errors import Refused
from rlt.serving.database import checkpoints, models
from rlt.serving.errors import Missing

SCHEME = "tinker://"
TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
NAME = re.compile("[^/\x00-\x1f\ud800-\udfff]{1,200}")
TTL_S = (3600, 10 * 366 * 24 * 3600)


@dataclass(frozen=True)
class Place:
    model_id: str
    kind: str
    name: str

    @property
    def path(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.kind}/{self.name}"


def check_name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in (".", ".."):
        raise Refused(f"a checkpoint's name is {name!r}: give 1 to 200 characters without a slash")
    return name


def parse_path(path: Any) -> Place:
    parts = path.removeprefix(SCHEME).split("/") if isinstance(path, str) and path.startswith(SCHEME) else []
    if len(parts) != 3 or parts[1] not in TYPES or not NAME.fullmatch(parts[0]):
        raise Refused(f"{path!r} is no path of a checkpoint: {SCHEME}MODEL/{'|'.join(TYPES)}/NAME is one")
    return Place(parts[0], parts[1], check_name(parts[2]))


def check_ttl(seconds: Any) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not TTL_S[0] <= seconds <= TTL_S[1]:
        raise Refused(f"ttl_seconds is {seconds!r}: give {TTL_S[0]} to {TTL_S[1]}, or null for ever")
    return float(seconds)


def _there(now: float) -> Any:
    return or_(checkpoints.c.expires.is_(None), checkpoints.c.expires > now)


def find(connection: Connection, path: str, tenant: str, reading: bool = False) -> Row:
    """A checkpoint of this tenant's; for `reading` also a published one.

    Raises:
        Missing: there is none, it expired, or it is another tenant's.
    """
    alive = and_(checkpoints.c.path == path, _there(time.time()))
    row = connection.execute(select(checkpoints).where(alive)).one_or_none()
    if row is None or not (row.tenant == tenant or (reading and row.public)):
        raise Missing(f"the checkpoint {path!r} is not known")
    return row


def check_free(connection: Connection, path: str, overwrite: bool) -> None:
    alive = and_(checkpoints.c.path == path, _there(time.time()))
    if not overwrite and connection.execute(select(checkpoints.c.path).where(alive)).one_or_none():
        raise Refused(f"{path} is there already: take another name, or overwrite it")


def record(connection: Connection, place: Place, model: Row, saved: Mapping[str, Any]) -> None:
    """A checkpoint that is whole, in the place of any before it of that name."""
    connection.execute(delete(checkpoints).where(checkpoints.c.path == place.path))
    row = {"path": place.path, "model_id": model.id, "kind": place.kind, "name": place.name, "tenant": model.tenant}
    row |= {"base_model": model.base_model, "adapter": model.adapter, "created": time.time(), **saved}
    connection.execute(insert(checkpoints).values(row))


def remove(connection: Connection, path: str, tenant: str) -> None:
    find(connection, path, tenant)
    connection.execute(delete(checkpoints).where(checkpoints.c.path == path))


def change(connection: Connection, path: str, tenant: str, **fields: Any) -> None:
    find(connection, path, tenant)
    connection.execute(update(checkpoints).where(checkpoints.c.path == path).values(fields))


def listed(connection: Connection, tenant: str, model_id: str | None, limit: int, offset: int) -> tuple[list[Row], int]:
    """The newest first, and how many there are in all."""
    theirs = and_(checkpoints.c.tenant == tenant, _there(time.time()))
    if model_id is not None:
        theirs = and_(theirs, checkpoints.c.model_id == model_id)
    total = connection.execute(select(func.count()).select_from(checkpoints).where(theirs)).scalar_one()
    rows = select(checkpoints).where(theirs).order_by(checkpoints.c.created.desc()).limit(limit).offset(offset)
    return list(connection.execute(rows)), total


def forget_expired(connection: Connection) -> None:
    connection.execute(delete(checkpoints).where(checkpoints.c.expires <= time.time()))


def runs(connection: Connection, tenant: str, limit: int, offset: int, project: str | None) -> tuple[list[Row], int]:
    theirs = and_(models.c.tenant == tenant, models.c.ready)
    if project is not None:
        theirs = and_(theirs, models.c.project_id == project)
    total = connection.execute(select(func.count()).select_from(models).where(theirs)).scalar_one()
    rows = select(models).where(theirs).order_by(models.c.used.desc()).limit(limit).offset(offset)
    return list(connection.execute(rows)), total


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def checkpoint_form(row: Row) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": TYPES[row.kind],
        "time": iso(row.created),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": row.user_metadata,
        "expires_at": iso(row.expires),
    }


def run_form(connection: Connection, row: Row) -> dict[str, Any]:
    found, _ = listed(connection, row.tenant, row.id, limit=1000, offset=0)
    last = {kind: next((checkpoint_form(each) for each in found if each.kind == kind), None) for kind in TYPES}
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": row.tenant,
        "is_lora": row.adapter["rank"] is not None,
        "corrupted": False,
        "lora_rank": row.adapter["rank"],
        "last_request_time": iso(row.used),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": row.user_metadata,
    }
