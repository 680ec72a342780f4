"""What keeps a page to itself: nothing from outside, and no script but its own."""

import base64
import hashlib

TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def policy(script: str | None) -> str:
    """What a browser may do for the page: nothing from outside, and no script but the page's own, whatever else has
    come into it (https://www.w3.org/TR/CSP3/)."""
    may = f"'{sum_of(script)}'" if script else "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {may}"


def sum_of(script: str) -> str:
    """By which a browser knows a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def readable(page: str) -> str:
    """Characters that turn the direction of what follows are shown as numbers, halves of characters as `?`."""
    return page.translate(TURNS).encode("utf-8", "replace").decode()
