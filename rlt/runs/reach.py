"""Whether a server answers, asked once and within a limit: a run should not learn it from a library's long waits."""

import ssl
import threading
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

LIMIT_S = 5.0
BROKEN = 500  # and above: the server's own errors, and of proxies that do not reach it


def why_unreachable(url: str, limit_s: float = LIMIT_S) -> str | None:
    """Why a server cannot be worked with now, by the proxies of the environment; None where it can.

    An answer that asks for a key, and a certificate that this machine does not know, are answers.
    """
    found: list[str | None] = []

    def ask() -> None:
        found.append(_ask(url, limit_s))

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else f"no answer within {limit_s:.0f} s"


def _ask(url: str, limit_s: float) -> str | None:
    try:
        urlopen(Request(url, method="HEAD"), timeout=limit_s).close()
    except HTTPError as error:
        return f"it answers {error.code}" if error.code >= BROKEN else None
    except URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no address
        return str(error)
    return None
