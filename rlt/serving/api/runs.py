"""Routes of training runs and checkpoints."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from rlt.errors import Refused
from rlt.serving.api.asking import Body, Serving, Tenant
from rlt.serving.api.downloads import link
from rlt.serving.database import models
from rlt.serving.sessions import checkpoints, copies, lives
from rlt.serving.sessions.checkpoints import Place, checkpoint_form, iso, parse_path, run_form
from rlt.serving.sessions.copies import Destination
from rlt.serving.sessions.listing import window
from rlt.wire.form import text_or_none, whole

router = APIRouter()
CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
LINKS_S = 3600.0


def path_of(run_id: str, kind: str, name: str) -> str:
    return parse_path(Place(run_id, kind, name).path).path


def cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


@router.get("/training_runs")
async def list_runs(
    service: Serving, tenant: Tenant, limit: int = 20, offset: int = 0, project_id: str | None = None
) -> dict[str, Any]:
    found, total = await service.database.run(checkpoints.runs, tenant, *window(limit, offset), project_id)
    forms = [await service.database.run(run_form, row) for row in found]
    return {"training_runs": forms, "cursor": cursor(limit, offset, total)}


@router.get("/training_runs/{run_id}")
async def get_run(run_id: str, service: Serving, tenant: Tenant) -> dict[str, Any]:
    row = await service.database.run(lives.owned, models, run_id, tenant, "training run")
    return await service.database.run(run_form, row)


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(
    run_id: str, service: Serving, tenant: Tenant, limit: int = 100, offset: int = 0
) -> dict[str, Any]:
    await service.database.run(lives.owned, models, run_id, tenant, "training run")
    found, total = await service.database.run(checkpoints.listed, tenant, run_id, *window(limit, offset))
    return {"checkpoints": [checkpoint_form(row) for row in found], "cursor": cursor(limit, offset, total)}


@router.get("/checkpoints")
async def list_checkpoints(service: Serving, tenant: Tenant, limit: int = 100, offset: int = 0) -> dict[str, Any]:
    found, total = await service.database.run(checkpoints.listed, tenant, None, *window(limit, offset))
    return {"checkpoints": [checkpoint_form(row) for row in found], "cursor": cursor(limit, offset, total)}


@router.delete(CHECKPOINT, status_code=204)
async def delete_checkpoint(run_id: str, kind: str, name: str, service: Serving, tenant: Tenant) -> Response:
    """Gone from every list at once; its files once no sampler reads them."""
    await service.database.run(checkpoints.remove, path_of(run_id, kind, name), tenant)
    return Response(status_code=204)


@router.post(f"{CHECKPOINT}/publish", status_code=204)
async def publish(run_id: str, kind: str, name: str, service: Serving, tenant: Tenant) -> Response:
    await service.database.run(checkpoints.change, path_of(run_id, kind, name), tenant, public=True)
    return Response(status_code=204)


@router.delete(f"{CHECKPOINT}/publish", status_code=204)
async def unpublish(run_id: str, kind: str, name: str, service: Serving, tenant: Tenant) -> Response:
    await service.database.run(checkpoints.change, path_of(run_id, kind, name), tenant, public=False)
    return Response(status_code=204)


@router.put(f"{CHECKPOINT}/ttl", status_code=204)
async def set_ttl(run_id: str, kind: str, name: str, service: Serving, tenant: Tenant, body: Body) -> Response:
    seconds = checkpoints.check_ttl(body.get("ttl_seconds"))
    expires = None if seconds is None else time.time() + seconds
    await service.database.run(checkpoints.change, path_of(run_id, kind, name), tenant, expires=expires)
    return Response(status_code=204)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_urls(run_id: str, name: str, request: Request, service: Serving, tenant: Tenant) -> dict[str, Any]:
    row = await service.database.run(checkpoints.find, path_of(run_id, "external_weights", name), tenant)
    expires = time.time() + LINKS_S
    urls = {each: link(request, service, row.address, each, expires) for each in service.storage.files(row.address)}
    return {"urls": urls, "expires": iso(expires)}


@router.get(f"{CHECKPOINT}/archive")
async def archive(run_id: str, kind: str, name: str, request: Request, service: Serving, tenant: Tenant) -> Response:
    row = await service.database.run(checkpoints.find, path_of(run_id, kind, name), tenant)
    expires = time.time() + LINKS_S
    headers = {"Location": link(request, service, row.address, "archive.tar", expires), "Expires": iso(expires) or ""}
    return Response(status_code=302, headers=headers)


@router.post("/copy_weights")
async def copy_weights(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    """A checkpoint under a new training run, of a session or of a project; both share the files."""
    if body.get("weights_access_token") is not None:
        raise Refused("weights_access_token is not known here: a tenant copies its own weights and published ones")
    project, session_id = text_or_none(body, "destination_project_id"), text_or_none(body, "session_id")
    number = None if body.get("model_seq_id") is None else whole(body["model_seq_id"], "model_seq_id", most=2**31)
    if (session_id is None) != (number is None) or (session_id is None) == (project is None):
        raise Refused("give destination_project_id, or session_id and model_seq_id")
    seconds = checkpoints.check_ttl(body.get("ttl_seconds"))
    expires = None if seconds is None else time.time() + seconds
    source, target = parse_path(body.get("source_path")).path, Destination(tenant, project, session_id, number)
    return {"tinker_path": await service.database.run(copies.copy, source, target, expires)}
