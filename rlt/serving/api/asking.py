"""Who asks, and for what: what routes take from a request."""

from typing import Annotated, Any

from fastapi import Depends, Request

from rlt.serving.service import Service
from rlt.wire import form

PROTOBUF = "application/x-protobuf"


def service_of(request: Request) -> Service:
    return request.app.state.service


async def tenant_of(request: Request) -> str:
    """By X-API-Key, or as Prometheus and curl send keys, `Authorization: Bearer KEY`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = request.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else None)
    return await service_of(request).tenant_of(given)


async def body_of(request: Request) -> dict[str, Any]:
    return form.parse(await request.body())


def reads_protobuf(request: Request) -> bool:
    return PROTOBUF in request.headers.get("accept", "")


def sends_protobuf(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith(PROTOBUF)


Serving = Annotated[Service, Depends(service_of)]
Tenant = Annotated[str, Depends(tenant_of)]
Body = Annotated[dict[str, Any], Depends(body_of)]
