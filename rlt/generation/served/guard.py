"""The key of a server: asked for at every path but the health check.

vLLM's own key guards generation only, and not the paths that take weights.
"""

import os
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from rlt.places import KEY_VARIABLE

OPEN = ("/health",)


class KeyGuard:
    """ASGI middleware for `--middleware rlt.generation.served.guard.KeyGuard`."""

    def __init__(self, app):
        self.app = app
        self.wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("Authorization", "").encode()
            if not secrets.compare_digest(given, self.wanted):
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
                return
        await self.app(scope, receive, send)
