"""Sessions while they live, and the models and samplers that live with them."""

import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, Table, and_, insert, select, update

from rlt.serving.database import models, samplers, sessions
from rlt.serving.errors import Gone, Missing

EXPIRED = "expired"


def owned(connection: Connection, table: Table, key: str, tenant: str, word: str) -> Row:
    """A row of this tenant's.

    Raises:
        Missing: there is none, or it is another tenant's.
    """
    row = connection.execute(select(table).where(table.c.id == key)).one_or_none()
    if row is None or row.tenant != tenant:
        raise Missing(f"the {word} {key!r} is not known")
    return row


def open_session(connection: Connection, tenant: str, form: Mapping[str, Any], now: float) -> str:
    fields = ("tags", "user_metadata", "display_name", "project_id", "sdk_version")
    created = round(now, 6)  # clients give it back in microseconds
    row = {"id": uuid.uuid4().hex[:16], "tenant": tenant, "created": created, "seen": now}
    connection.execute(insert(sessions).values(row | {name: form.get(name) for name in fields}))
    return row["id"]


def living(connection: Connection, session_id: str, tenant: str) -> Row:
    row = owned(connection, sessions, session_id, tenant, "session")
    if row.ended:
        raise Gone(f"the session {session_id} is over ({row.ended})")
    return row


def heartbeat(connection: Connection, session_id: str, tenant: str, now: float) -> None:
    living(connection, session_id, tenant)
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(seen=now))


def end_session(connection: Connection, session_id: str, tenant: str, reason: str) -> None:
    owned(connection, sessions, session_id, tenant, "session")
    alive = and_(sessions.c.id == session_id, sessions.c.ended.is_(None))
    connection.execute(update(sessions).where(alive).values(ended=reason))


def end_silent(connection: Connection, before: float) -> int:
    """Sessions without a heartbeat since a time are over; how many."""
    silent = and_(sessions.c.ended.is_(None), sessions.c.seen < before)
    return connection.execute(update(sessions).where(silent).values(ended=EXPIRED)).rowcount


def greet_all(connection: Connection, now: float) -> None:
    """While the server was away no heartbeat could come."""
    connection.execute(update(sessions).where(sessions.c.ended.is_(None)).values(seen=now))


def model_id_of(session_id: str, number: int) -> str:
    return f"{session_id}:train:{number}"  # clients put it together themselves


def sampler_id_of(session_id: str, number: int) -> str:
    return f"{session_id}:sample:{number}"


def add_model(connection: Connection, row: Mapping[str, Any], now: float) -> None:
    """The model that a request will make; the same request again changes nothing."""
    if connection.execute(select(models.c.id).where(models.c.id == row["id"])).one_or_none() is None:
        connection.execute(insert(models).values({"created": now, "used": now, **row}))


def add_sampler(connection: Connection, row: Mapping[str, Any], now: float) -> None:
    if connection.execute(select(samplers.c.id).where(samplers.c.id == row["id"])).one_or_none() is None:
        connection.execute(insert(samplers).values({"created": now, **row}))


def living_model(connection: Connection, model_id: str, tenant: str, now: float) -> Row:
    """A model that can be trained: its session lives, and it was not unloaded."""
    row = owned(connection, models, model_id, tenant, "model")
    living(connection, row.session_id, tenant)
    if row.unloaded:
        raise Gone(f"the model {model_id} was unloaded")
    connection.execute(update(models).where(models.c.id == model_id).values(used=now))
    return row


def living_sampler(connection: Connection, sampler_id: str, tenant: str) -> Row:
    row = owned(connection, samplers, sampler_id, tenant, "sampler")
    living(connection, row.session_id, tenant)
    return row


def join_sampler(connection: Connection, sampler_id: str, tenant: str) -> int:
    counter = living_sampler(connection, sampler_id, tenant).clients + 1
    connection.execute(update(samplers).where(samplers.c.id == sampler_id).values(clients=counter))
    return counter


def ids_of(connection: Connection, table: Table, session_id: str) -> list[str]:
    rows = select(table.c.id).where(table.c.session_id == session_id).order_by(table.c.created)
    return list(connection.execute(rows).scalars())


def left_behind(connection: Connection) -> list[str]:
    """Models whose sessions are over and that still take memory; they count as unloaded from here on."""
    over = select(sessions.c.id).where(sessions.c.ended.is_not(None))
    theirs = models.c.session_id.in_(over) & models.c.unloaded.is_(False)
    found = list(connection.execute(select(models.c.id).where(theirs)).scalars())
    connection.execute(update(models).where(models.c.id.in_(found)).values(unloaded=True))
    return found


def abandoned_samplers(connection: Connection) -> list[Row]:
    """Unnamed weights of sessions that are over; they are forgotten from here on."""
    over = select(sessions.c.id).where(sessions.c.ended.is_not(None))
    theirs = samplers.c.session_id.in_(over) & samplers.c.model_id.is_not(None)
    found = list(connection.execute(select(samplers).where(theirs)))
    connection.execute(samplers.delete().where(theirs))
    return found
