"""Lists of a tenant's sessions."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, func, select, update

from rlt.errors import Refused
from rlt.serving.database import checkpoints, models, sessions
from rlt.serving.sessions.lives import owned

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


def search(connection: Connection, tenant: str, form: Mapping[str, Any], limit: int, offset: int) -> list[RowMapping]:
    """Sessions that have all that is asked for, the newest first."""
    saved = select(func.count()).select_from(checkpoints.join(models, models.c.id == checkpoints.c.model_id))
    columns = {
        "session_id": sessions.c.id,
        "created_at": sessions.c.created,
        "owner": sessions.c.tenant,
        "project_id": sessions.c.project_id,
        "display_name": sessions.c.display_name,
        "user_metadata": sessions.c.user_metadata,
        "status": sessions.c.ended,
        "checkpoints_count": saved.where(models.c.session_id == sessions.c.id).scalar_subquery(),
    }
    rows = select(*(column.label(name) for name, column in columns.items())).where(sessions.c.tenant == tenant)
    for name in ("session_id", "display_name"):
        if form.get(name):
            rows = rows.where(columns[name] == str(form[name]))
    if projects := form.get("project_ids"):
        rows = rows.where(sessions.c.project_id.in_([str(each) for each in projects]))
    wanted = (form.get("user_metadata") or {}).items()
    found = connection.execute(rows.order_by(sessions.c.created.desc())).mappings()
    matching = [row for row in found if wanted <= (row["user_metadata"] or {}).items()]
    return matching[offset : offset + limit]
