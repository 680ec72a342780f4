"""The route that clients poll, and the one by which they cancel."""

import json
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import Row

from rlt.errors import Refused
from rlt.serving.api.asking import PROTOBUF, Body, Serving, Tenant, reads_protobuf
from rlt.serving.database import samplers
from rlt.serving.kinds import KINDS
from rlt.serving.requests import rows
from rlt.serving.sessions import lives
from rlt.wire import json_form, protobuf
from rlt.wire.form import mapping, sequence, text, whole

router = APIRouter()
METADATA_FIRST = 2**20  # bytes of an answer from which a client that asks is told the size before


def try_again(request_id: str, crowd: int) -> dict[str, str]:
    said = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    if crowd:
        said |= {"queue_state": "paused_capacity", "queue_state_reason": f"{crowd} requests of this model wait"}
    return said


def in_json(row: Row) -> Any:
    """A result that is kept as protobuf, for clients that read JSON only."""
    if row.kind == "sample":
        return json_form.write_sample(protobuf.read_sample(row.result))
    return json_form.write_output(protobuf.read_output(row.result))


@router.post("/retrieve_future")
async def retrieve_future(request: Request, service: Serving, tenant: Tenant, body: Body) -> Response:
    request_id = text(body, "request_id")
    service.polls += 1
    try:
        row = await service.requests.poll(request_id, tenant)
    finally:
        service.polls -= 1
    if row is None:
        return JSONResponse(try_again(request_id, service.requests.crowd(request_id)))
    if row.state == rows.FAILED:
        return JSONResponse(rows.failure(row))
    if body.get("allow_metadata_only") is True and len(row.result) > METADATA_FIRST:
        return JSONResponse({"status": "complete_metadata", "response_payload_size": len(row.result)})
    if not KINDS[row.kind].protobuf:
        return Response(row.result, media_type="application/json")
    if reads_protobuf(request):
        return Response(row.result, media_type=PROTOBUF)
    return Response(json.dumps(in_json(row)), media_type="application/json")


@router.post("/retrieve_futures")
async def retrieve_futures(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    """Which samples of a sampler's client have ended since the cursor; held until one has, or the time is over."""
    target = mapping(body.get("target"), "target")
    sampler_id, clone = text(target, "sampling_session_id"), whole(target.get("cloned_sampler_id", 0), "clone")
    await service.database.run(lives.owned, samplers, sampler_id, tenant, "sampler")
    seen = [
        text({"request_id": each}, "request_id") for each in sequence(body.get("retrieved_request_ids") or [], "ids")
    ]
    await service.database.run(rows.fetched, seen, tenant)
    since, limit = whole(body.get("prev_cursor") or 0, "prev_cursor"), body.get("timeout")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0):
        raise Refused(f"timeout is {limit!r}: give seconds from 0 on")
    service.polls += 1
    try:
        found, cursor = await service.requests.ended_samples(sampler_id, clone, since, limit)
    finally:
        service.polls -= 1
    return {"completions": [completion(row) for row in found], "cursor": cursor}


def completion(row: Row) -> dict[str, Any]:
    if row.state == rows.DONE:
        return {"state": "finished", "request_id": row.id, "response_payload_uncompressed_size": row.size}
    return {"state": "failed", "request_id": row.id}


@router.post("/cancel_future", status_code=204)
async def cancel_future(service: Serving, tenant: Tenant, body: Body) -> Response:
    """A sample that was not begun is not begun; numbers of training keep their order and are executed."""
    await service.requests.cancel(text(body, "request_id"), tenant)
    return Response(status_code=204)
