"""The rows of requests: what was promised to a client, until its answer has been kept long enough."""

import itertools
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from rlt.errors import Refused
from rlt.serving.database import requests, sessions
from rlt.serving.errors import Gone, Missing

WAITING, DONE, FAILED, EXPIRED = "waiting", "done", "failed", "expired"
ENDED = (DONE, FAILED, EXPIRED)
ENDS = itertools.count(time.time_ns())  # taken on the database's thread
CLONES = 10**9  # numbers of one client of a sampler
PAGE = 1000  # rows of one answer
USER, SERVER = "user", "server"  # whose fault a failure is


@dataclass(frozen=True)
class Submission:
    """A request as it came; `refusal` marks one whose number is used although its content cannot be."""

    tenant: str
    session_id: str
    kind: str
    lane: str  # the model's or sampler's id
    seq_id: int
    payload: bytes | None
    details: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None


def keep(connection: Connection, submission: Submission, now: float) -> tuple[str, bool]:
    """The request's id, and whether it is new: the same number of the same lane is the same request."""
    same = (requests.c.lane == submission.lane) & (requests.c.seq_id == submission.seq_id)
    before = connection.execute(select(requests.c.id, requests.c.tenant).where(same)).one_or_none()
    if before is not None:
        if before.tenant != submission.tenant:
            raise Missing(f"{submission.lane} is not known")
        return before.id, False
    row = {name: getattr(submission, name) for name in ("tenant", "session_id", "kind", "lane", "seq_id", "payload")}
    request_id, refusal = uuid.uuid4().hex, submission.refusal
    row |= {"id": request_id, "details": dict(submission.details), "state": WAITING, "created": now, "error": refusal}
    connection.execute(insert(requests).values(row))
    return request_id, True


def read(connection: Connection, request_id: str) -> Row:
    return connection.execute(select(requests).where(requests.c.id == request_id)).one()


def read_of(connection: Connection, request_id: str, tenant: str) -> Row:
    """A request of this tenant's.

    Raises:
        Missing: it never was, or is another tenant's.
        Gone: its answer was kept long enough.
    """
    row = connection.execute(select(requests).where(requests.c.id == request_id)).one_or_none()
    if row is None or row.tenant != tenant:
        raise Missing(f"the request {request_id!r} is not known")
    if row.state == EXPIRED:
        raise Gone(f"the answer of {request_id} is no longer kept")
    return row


def set_payload(connection: Connection, request_id: str, payload: bytes | None) -> None:
    connection.execute(update(requests).where(requests.c.id == request_id).values(payload=payload))


def finish(connection: Connection, request_id: str, result: bytes, now: float, tokens: int, again: bool) -> None:
    """`again`: the request may have to be executed once more, so its payload stays."""
    change: dict[str, Any] = {"state": DONE, "result": result, "finished": now, "tokens": tokens, "ended": next(ENDS)}
    if not again:
        change["payload"] = None
    connection.execute(update(requests).where(requests.c.id == request_id).values(change))


def fail(connection: Connection, ids: list[str], error: str, category: str, now: float, again: bool = False) -> None:
    """`again`: it changed its model all the same, so it may have to fail once more, and its payload stays."""
    change: dict[str, Any] = {"state": FAILED, "error": error, "category": category, "finished": now}
    change["ended"] = next(ENDS)
    if not again:
        change["payload"] = None
    still = requests.c.id.in_(ids) & (requests.c.state == WAITING)
    connection.execute(update(requests).where(still).values(change))


def ended_since(connection: Connection, lane: str, clone: int, cursor: int) -> list[Row]:
    """Samples of one client of a sampler that have ended after a cursor, in that order."""
    size = func.length(requests.c.result).label("size")
    theirs = (requests.c.lane == lane) & requests.c.seq_id.between(clone * CLONES, (clone + 1) * CLONES - 1)
    rows = select(requests.c.id, requests.c.state, requests.c.ended, size)
    rows = rows.where(theirs, requests.c.ended > cursor, requests.c.state.in_((DONE, FAILED)))
    return list(connection.execute(rows.order_by(requests.c.ended).limit(PAGE)))


def fetched(connection: Connection, ids: list[str], tenant: str) -> None:
    """Answers that their client has, and does not ask for again."""
    theirs = requests.c.id.in_(ids) & (requests.c.tenant == tenant) & requests.c.state.in_((DONE, FAILED))
    connection.execute(update(requests).where(theirs).values(state=EXPIRED, result=None, error=None))


def waiting(connection: Connection) -> list[Row]:
    """What an earlier process of the server promised and did not answer."""
    size = func.coalesce(func.length(requests.c.payload), 0).label("size")
    some = select(requests.c.id, requests.c.kind, requests.c.lane, requests.c.seq_id, requests.c.tenant, size)
    return list(connection.execute(some.where(requests.c.state == WAITING).order_by(requests.c.seq_id)))


def next_number(connection: Connection, lane: str) -> int:
    """One more than the last that ended: numbers end in their order, those of closed gaps all at once."""
    ended = (requests.c.lane == lane) & requests.c.state.in_(ENDED)
    last = connection.execute(select(func.max(requests.c.seq_id)).where(ended)).scalar_one()
    return 0 if last is None else last + 1


def journal(connection: Connection, lane: str, after: int, kinds: tuple[str, ...]) -> list[Row]:
    """The requests, in order, that changed a model since `after`, with their payloads."""
    changed = (requests.c.lane == lane) & (requests.c.seq_id > after) & requests.c.kind.in_(kinds)
    rows = select(requests).where(changed, requests.c.state.in_(ENDED), requests.c.payload.is_not(None))
    return list(connection.execute(rows.order_by(requests.c.seq_id)))


def journal_size(connection: Connection, lane: str, after: int) -> tuple[int, int]:
    """Requests and bytes that would have to be executed again."""
    past = (requests.c.lane == lane) & (requests.c.seq_id > after) & requests.c.payload.is_not(None)
    count = select(func.count(), func.coalesce(func.sum(func.length(requests.c.payload)), 0)).where(past)
    number, size = connection.execute(count).one()
    return number, size


def drop_payloads(connection: Connection, lane: str, up_to: int | None = None) -> None:
    """Of what ended and need not be executed again."""
    ended = (requests.c.lane == lane) & requests.c.state.in_(ENDED)
    if up_to is not None:
        ended &= requests.c.seq_id <= up_to
    connection.execute(update(requests).where(ended).values(payload=None))


def expire(connection: Connection, before: float) -> int:
    """Answers that ended before a time are dropped; how many."""
    old = requests.c.state.in_((DONE, FAILED)) & (requests.c.finished < before)
    return connection.execute(update(requests).where(old).values(state=EXPIRED, result=None, error=None)).rowcount


def forget(connection: Connection, before: float) -> int:
    """Requests whose sessions are over and whose answers are no longer kept; how many."""
    over = select(sessions.c.id).where(sessions.c.ended.is_not(None))
    old = (requests.c.state == EXPIRED) & (requests.c.finished < before) & requests.c.session_id.in_(over)
    return connection.execute(delete(requests).where(old)).rowcount


def failure(row: Row) -> dict[str, str]:
    return {"error": row.error, "category": row.category}


def check_ahead(seq_id: int, expected: int, most: int) -> None:
    if seq_id > expected + most:
        raise Refused(f"seq_id is {seq_id}, {expected} is next: {most} numbers ahead at most")
