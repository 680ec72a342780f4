"""The key of a server: asked for at every path but the health check; and two paths that vLLM's server has not.

vLLM's own key guards generation only, and not the paths that take weights.
"""

import os
import secrets
import signal

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from rlt.generation.served.client import END, TRANSFER
from rlt.places import KEY_VARIABLE, TRANSFER_VARIABLE

OPEN = ("/health",)


class KeyGuard:
    """ASGI middleware for `--middleware rlt.generation.served.guard.KeyGuard`."""

    def __init__(self, app):
        self.app = app
        self.wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()
        self.transfer = os.environ.get(TRANSFER_VARIABLE, "")

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("Authorization", "").encode()
            if not secrets.compare_digest(given, self.wanted):
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
                return
        if scope["type"] == "http" and scope["path"] == END:
            os.kill(os.getpid(), signal.SIGKILL)  # its launcher ends the rest, and starts another
        if scope["type"] == "http" and scope["path"] == TRANSFER:
            await JSONResponse({"transfer": self.transfer})(scope, receive, send)
            return
        await self.app(scope, receive, send)
