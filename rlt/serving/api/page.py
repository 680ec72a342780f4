"""The page at `/`: what a tenant's models and queues are at, for a person with a browser.

A browser signs in with the key and gets a cookie that says whose it is and until when, signed by the server; the key
itself is not kept.
"""

import hashlib
import hmac
import html
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import Connection, Row, func, select

import rlt.reports
from rlt.reports.lines import curve, number
from rlt.reports.safe import policy, readable
from rlt.serving.api.asking import Serving
from rlt.serving.database import metrics, requests
from rlt.serving.errors import WrongKey
from rlt.serving.service import Service
from rlt.serving.sessions import checkpoints, listing
from rlt.serving.sessions.curves import Curves, curves_of

router = APIRouter()
COOKIE = "rlt-page"
SIGNED_IN_S = 12 * 3600
FORM_BYTES = 4096
MOST_MODELS = 20
AGAIN_S = 15
STYLE = (Path(rlt.reports.__file__).parent / "page.css").read_text(encoding="utf-8")
OWN_STYLE = """
figure { display: inline-block; margin: .4rem 1.2rem .6rem 0; } svg { background: var(--paper); display: block; }
figcaption { font-size: .85rem; } form input { font: inherit; } td.number { text-align: right; }
"""
HEADERS = {
    "Content-Security-Policy": f"{policy(None)}; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _signature(service: Service, tenant: str, expires: int) -> str:
    return hmac.new(service.secret, f"page\n{tenant}\n{expires}".encode(), hashlib.sha256).hexdigest()


def pass_of(service: Service, tenant: str) -> str:
    expires = int(time.time()) + SIGNED_IN_S
    return f"{expires}.{_signature(service, tenant, expires)}.{tenant.encode().hex()}"


def tenant_in(service: Service, given: str) -> str | None:
    """Whose pass it is; None where it is none, or its time is over."""
    expires, _, rest = given.partition(".")
    signature, _, name = rest.partition(".")
    try:
        tenant, until = bytes.fromhex(name).decode(), int(expires)
    except ValueError:
        return None
    right = hmac.compare_digest(_signature(service, tenant, until).encode(), signature.encode())
    return tenant if right and until > time.time() else None


async def visitor(request: Request, service: Service) -> str | None:
    if key := request.headers.get("x-api-key"):
        return await service.tenant_of(key)
    return tenant_in(service, request.cookies.get(COOKIE, ""))


def page(title: str, parts: list[str], code: int = 200, again: bool = False) -> HTMLResponse:
    refresh = f'<meta http-equiv=refresh content="{AGAIN_S}">' if again else ""
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8>{refresh}"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{OWN_STYLE}</style>{''.join(parts)}</html>"
    )
    return HTMLResponse(readable(text), code, HEADERS)


def sign_in(said: str, code: int) -> HTMLResponse:
    form = (
        f"<h1>Training API</h1><p>{html.escape(said)}</p><form method=post action=/sign-in>"
        "<label>Key <input type=password name=key required autocomplete=current-password></label> "
        "<button>Sign in</button></form>"
    )
    return page("Training API", [form], code)


@router.get("/")
async def show(request: Request, service: Serving) -> Response:
    tenant = await visitor(request, service)
    if tenant is None:
        return sign_in("This page shows your runs: sign in with the key that your programs send.", 401)
    seen = await service.database.run(read, tenant)
    return page(f"Runs of {tenant}", written(tenant, seen, waiting(service, tenant)), again=True)


@router.post("/sign-in")
async def signed_in(request: Request, service: Serving) -> Response:
    body = await request.body()
    given = parse_qs(body[:FORM_BYTES].decode(errors="replace")).get("key", [""])[0]
    try:
        tenant = await service.tenant_of(given.strip())
    except WrongKey:
        return sign_in("This key is not known here.", 401)
    answer = RedirectResponse("/", 303, HEADERS)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, pass_of(service, tenant), SIGNED_IN_S, httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/sign-out")
async def signed_out() -> Response:
    answer = RedirectResponse("/", 303, HEADERS)
    answer.delete_cookie(COOKIE)
    return answer


def waiting(service: Service, tenant: str) -> Counter:
    """Requests of this tenant's without an answer, by the model or sampler that they ask."""
    return Counter(each.lane for each in service.requests.pending.values() if each.tenant == tenant)


def read(connection: Connection, tenant: str) -> dict[str, Any]:
    found, total = checkpoints.runs(connection, tenant, MOST_MODELS, 0, None)
    theirs = requests.c.tenant == tenant
    ended = select(requests.c.kind, requests.c.state, func.count(), func.sum(requests.c.tokens)).where(theirs)
    counted = connection.execute(ended.group_by(requests.c.kind, requests.c.state).order_by(requests.c.kind))
    steps = select(metrics.c.model_id, func.count()).where(
        metrics.c.kind == "optim_step", metrics.c.model_id.in_([model.id for model in found])
    )
    return {
        "models": [(model, curves_of(connection, model.id)) for model in found],
        "total": total,
        "steps": dict(tuple(row) for row in connection.execute(steps.group_by(metrics.c.model_id))),
        "requests": [tuple(row) for row in counted],
        "sessions": listing.living_sessions(connection, tenant),
    }


def written(tenant: str, seen: dict[str, Any], queue: Counter) -> list[str]:
    known = {model.id for model, _ in seen["models"]}
    others = sum(count for lane, count in queue.items() if lane not in known)
    parts = [
        f"<h1>Runs of {html.escape(tenant)}</h1>",
        f"<p>{seen['sessions']} open sessions, {seen['total']} models, {sum(queue.values())} requests waiting "
        f"({others} of samplers). The page reads itself anew every {AGAIN_S} s.</p>",
        "<form method=post action=/sign-out><button>Sign out</button></form>",
        table(("model", "base", "rank", "steps", "waiting", "used", "state"), [
            (model.id, model.base_model, model.adapter["rank"] or "all weights", seen["steps"].get(model.id, 0),
             queue.get(model.id, 0), str(checkpoints.iso(model.used))[:19], "gone" if model.unloaded else "here")
            for model, _ in seen["models"]]),
    ]  # fmt: skip
    for model, curves in seen["models"]:
        parts += section(model, curves)
    kinds = [(kind, state, count, int(tokens or 0)) for kind, state, count, tokens in seen["requests"]]
    return [*parts, "<h2>Requests</h2>", table(("kind", "state", "requests", "tokens"), kinds)]


def section(model: Row, curves: Curves) -> list[str]:
    drawn = [curve(name, points) for name, points in sorted(curves.items(), key=lambda each: _place(each[0]))]
    return [f"<h2>{html.escape(model.id)}</h2>", f"<div>{''.join(drawn)}</div>"] if drawn else []


def _place(name: str) -> tuple[bool, bool, str]:
    """Losses first, then rewards."""
    return "loss" not in name, "reward" not in name, name


def table(head: tuple[str, ...], body: list[tuple]) -> str:
    if not body:
        return f"<p class=n>no {head[0]} so far</p>"
    lines = ["".join(f"<th>{html.escape(word)}</th>" for word in head)]
    lines += ["".join(cell(value) for value in row) for row in body]
    return f"<div class=wide><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def cell(value: Any) -> str:
    shown = number(value) if isinstance(value, float) else html.escape(str(value))
    kind = " class=number" if isinstance(value, int | float) else ""
    return f"<td{kind}>{shown}</td>"
