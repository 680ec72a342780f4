"""Lists of a tenant's sessions."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, func, select, tuple_, update

from rlt.errors import Refused
from rlt.serving.database import checkpoints, models, sessions
from rlt.serving.sessions.lives import EXPIRED, owned

MOST = 1000  # rows of one answer


def window(limit: int, offset: int) -> tuple[int, int]:
    if not (0 < limit <= MOST and 0 <= offset < 2**31):
        raise Refused(f"limit and offset are {limit} and {offset}: 1 to {MOST} rows from 0 on are listed")
    return limit, offset


def living_sessions(connection: Connection, tenant: str) -> int:
    theirs = (sessions.c.tenant == tenant) & sessions.c.ended.is_(None)
    return connection.execute(select(func.count()).select_from(sessions).where(theirs)).scalar_one()


def sessions_of(connection: Connection, tenant: str, limit: int, offset: int) -> list[Row]:
    theirs = select(sessions).where(sessions.c.tenant == tenant).order_by(sessions.c.created.desc())
    return list(connection.execute(theirs.limit(limit).offset(offset)))


def set_project(connection: Connection, session_id: str, tenant: str, project: str | None) -> None:
    owned(connection, sessions, session_id, tenant, "session")
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(project_id=project))
    connection.execute(update(models).where(models.c.session_id == session_id).values(project_id=project))


def _matches(row: RowMapping, form: Mapping[str, Any]) -> bool:
    """Whether a session has what is asked for: its id or words of its name, its project, metadata and status."""
    words, name = str(form.get("display_name") or "").lower().split(), str(row["display_name"] or "").lower()
    named = [row["session_id"] == form["session_id"]] if form.get("session_id") else []
    named += [all(word in name for word in words)] if words else []
    projects = form.get("project_ids")
    wanted = (form.get("user_metadata") or {}).items()
    return (
        (any(named) or not named)
        and (projects is None or row["project_id"] in projects)
        and wanted <= (row["user_metadata"] or {}).items()
        and _has_status(status_of(row["ended"]), form.get("statuses"))
    )


def status_of(ended: str | None) -> dict[str, Any] | None:
    """As clients know it; None of a session that nobody finished."""
    if ended is None:
        return {"type": "active"}
    return None if ended == EXPIRED else {"type": "client_finished", "reason": {"type": ended}}


def _has_status(status: dict[str, Any] | None, asked: list[dict[str, Any]] | None) -> bool:
    if asked is None or status is None:
        return asked is None
    reason = status.get("reason", {}).get("type")
    return any(each.get("type") == status["type"] and reason in (each.get("reasons") or [reason]) for each in asked)


def search(
    connection: Connection, tenant: str, form: Mapping[str, Any], limit: int, after: tuple[float, str] | None
) -> list[dict[str, Any]]:
    """A page of sessions, the newest first; `after` is the place of the last one of the page before."""
    saved = select(func.count()).select_from(checkpoints.join(models, models.c.id == checkpoints.c.model_id))
    columns = (
        sessions.c.id.label("session_id"),
        sessions.c.created,
        sessions.c.tenant.label("owner"),
        func.coalesce(sessions.c.project_id, "").label("project_id"),
        sessions.c.display_name,
        sessions.c.user_metadata,
        sessions.c.ended,
        saved.where(models.c.session_id == sessions.c.id).scalar_subquery().label("checkpoints_count"),
    )
    rows = select(*columns).where(sessions.c.tenant == tenant)
    if after is not None:
        rows = rows.where(tuple_(sessions.c.created, sessions.c.id) < tuple_(*after))
    found: Any = connection.execute(rows.order_by(sessions.c.created.desc(), sessions.c.id.desc())).mappings()
    return [{**row, "status": status_of(row["ended"])} for row in found if _matches(row, form)][:limit]
