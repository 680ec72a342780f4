"""The application: routes, errors and limits around a service."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from rlt.errors import Refused
from rlt.serving.api import downloads, extras, figures, futures, page, runs, sampling, start, training
from rlt.serving.api.limits import BodyLimit, TooLarge, TooSlow
from rlt.serving.errors import Busy, Gone, Missing, Unavailable, WrongKey
from rlt.serving.service import Service

PREFIX = "/api/v1"
CODES = {Refused: 400, WrongKey: 401, Missing: 404, TooSlow: 408, Gone: 410, TooLarge: 413, Busy: 429}
CODES |= {Unavailable: 503, OSError: 503}  # OSError: of the place where tensors are kept
COME_AGAIN_S = "1"
LATER = (429, 503)


async def said(request: Request, error: Exception) -> JSONResponse:
    code = next(code for kind, code in CODES.items() if isinstance(error, kind))
    headers = {"Retry-After": COME_AGAIN_S} if code in LATER else None
    return JSONResponse({"detail": str(error)}, code, headers)


async def unfit(request: Request, error: Exception) -> JSONResponse:
    """Where the fields are wrong, and nothing of the body, which may be binary."""
    assert isinstance(error, RequestValidationError)
    places = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()]
    return JSONResponse({"detail": "; ".join(places)}, 422)


async def vanished(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=400)


def create_app(service: Service) -> FastAPI:
    """The service was started, and is closed, by who made it."""
    app = FastAPI(title="Training API", openapi_url=None)
    app.state.service = service
    for part in (start, training, sampling, futures, runs, downloads, figures, extras):
        app.include_router(part.router, prefix=PREFIX)
    app.include_router(figures.router)
    app.include_router(page.router)
    app.add_api_route("/healthz", start.healthz)
    for kind in CODES:
        app.add_exception_handler(kind, said)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(ClientDisconnect, vanished)
    settings = service.settings
    app.add_middleware(BodyLimit, most=settings.limits.body_bytes, most_in_all=settings.bodies_bytes)
    return app
