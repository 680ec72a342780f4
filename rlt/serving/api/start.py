"""Routes with which a client begins, stays and goes; brief descriptions of what there is."""

import time
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response

from rlt.errors import Refused
from rlt.serving.api.asking import Body, Serving, Tenant
from rlt.serving.database import models, samplers, sessions
from rlt.serving.sessions import listing, lives
from rlt.serving.sessions.checkpoints import iso
from rlt.wire.form import mapping, sequence, text, text_or_none, texts_or_none, whole

router = APIRouter()
TEXTS = ("display_name", "project_id", "sdk_version")


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.post("/client/config")
async def client_config(service: Serving, tenant: Tenant) -> dict[str, Any]:
    return dict(service.settings.client_flags)


@router.post("/client/dynamic_config")
async def dynamic_config(tenant: Tenant) -> dict[str, Any]:
    return {}


@router.get("/get_server_capabilities")
async def capabilities(service: Serving, tenant: Tenant) -> dict[str, Any]:
    places = service.settings.base_models.items()
    each = {"trainable": True, "sampleable": True}
    return {"supported_models": [{"model_name": name, "max_context_length": p.context, **each} for name, p in places]}


@router.post("/create_session")
async def create_session(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    form = {name: text_or_none(body, name) for name in TEXTS}
    tags = None if body.get("tags") is None else [text({"tag": each}, "tag") for each in sequence(body["tags"], "tags")]
    form |= {"tags": tags, "user_metadata": texts_or_none(body, "user_metadata")}
    living = await service.database.run(listing.living_sessions, tenant)
    if living >= service.settings.sessions_of_a_tenant:
        raise Refused(f"{living} sessions are open: finish some")
    session_id = await service.database.run(lives.open_session, tenant, form, time.time())
    return {"type": "create_session", "session_id": session_id}


@router.post("/session_heartbeat")
async def session_heartbeat(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    await service.database.run(lives.heartbeat, text(body, "session_id"), tenant, time.time())
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(session_id: str, service: Serving, tenant: Tenant, body: Body) -> Response:
    given = body.get("reason")
    reason = given.get("type") if isinstance(given, dict) else given
    said = reason if reason in ("success", "errored", "interrupted") else "success"
    await service.database.run(lives.end_session, session_id, tenant, said)
    return Response(status_code=204)


@router.post("/telemetry")
async def telemetry(tenant: Tenant) -> dict[str, str]:
    return {"status": "accepted"}


@router.get("/sessions")
async def list_sessions(service: Serving, tenant: Tenant, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    rows = await service.database.run(listing.sessions_of, tenant, *listing.window(limit, offset))
    return {"sessions": [row.id for row in rows]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, service: Serving, tenant: Tenant) -> dict[str, Any]:
    row = await service.database.run(lives.owned, sessions, session_id, tenant, "session")
    trained = await service.database.run(lives.ids_of, models, session_id)
    sampled = await service.database.run(lives.ids_of, samplers, session_id)
    named = {"user_metadata": row.user_metadata, "display_name": row.display_name}
    return {"training_run_ids": trained, "sampler_ids": sampled, **named}


@router.put("/sessions/{session_id}/project", status_code=204)
async def set_project(session_id: str, service: Serving, tenant: Tenant, body: Body) -> Response:
    await service.database.run(listing.set_project, session_id, tenant, text_or_none(body, "project_id"))
    return Response(status_code=204)


def read_cursor(body: dict[str, Any]) -> tuple[float, str] | None:
    if body.get("cursor") is None:
        return None
    cursor = mapping(body["cursor"], "cursor")
    try:
        created = datetime.fromisoformat(text(cursor, "last_created_at")).timestamp()
    except (ValueError, OverflowError) as error:
        raise Refused(f"cursor is {cursor}: give the one of an earlier answer") from error
    return created, text(cursor, "last_session_id")


@router.post("/sessions/search")
async def search_sessions(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    limit = whole(body.get("limit") or 50, "limit", 1, 200)
    texts_or_none(body, "user_metadata")
    for name in ("project_ids", "statuses"):
        if body.get(name) is not None:
            sequence(body[name], name)
    for each in body.get("statuses") or []:
        sequence(mapping(each, "a status").get("reasons") or [], "reasons")
    rows = await service.database.run(listing.search, tenant, body, limit + 1, read_cursor(body))
    found = [{**row, "created_at": iso(row["created"])} for row in rows[:limit]]
    last = {"last_created_at": found[-1]["created_at"], "last_session_id": found[-1]["session_id"]} if found else None
    return {"sessions": found, "next_cursor": last if len(rows) > limit else None}
