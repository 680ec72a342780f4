"""What a stranger may throw at a port: `python tests/chaos/nonsense.py ADDRESS PIECES PORT...`, from wherever it can be
reached. Says as JSON how many pieces were taken and how many connections were refused.

Some forms begin as PyTorch's TCPStore wants it, with its magic number: half of a frame, lengths that nobody means.
"""

import contextlib
import json
import secrets
import socket
import struct
import sys
from collections.abc import Callable

VALIDATE = struct.pack("<BI", 0, 0x3C85F7CE)  # torch/csrc/distributed/c10d/TCPStoreBackend.hpp
QUERIES = range(1, 17)  # the queries that follow it there, and two that do not exist
HUGE = (2**63 - 1, 2**64 - 1, 2**40, 2**31, 2**27, 8 * 2**20 + 1)
HELD_EVERY, MOST_HELD = 20, 200  # of the connections, some stay open, as those of a slow or dead peer do
LIMIT_S = 2.0


def _query(number: int, rest: Callable[[int], bytes]) -> bytes:
    return VALIDATE + bytes([QUERIES[number % len(QUERIES)]]) + rest(number)


FORMS: dict[str, Callable[[int], bytes]] = {
    "random bytes": lambda number: secrets.token_bytes(1 + number % 600) + b"\n",
    "zeros": lambda number: bytes(1 + number % 600),
    "ones": lambda number: b"\xff" * (1 + number % 600),
    "HTTP": lambda number: f"GET /{number} HTTP/1.1\r\nHost: rlt\r\nContent-Length: {HUGE[0]}\r\n\r\n".encode(),
    "TLS": lambda number: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + secrets.token_bytes(500),
    "nothing": lambda number: b"",
    "half a magic number": lambda number: VALIDATE[: number % 5],
    "another magic number": lambda number: b"\0" + secrets.token_bytes(4),
    "the magic number alone": lambda number: VALIDATE,
    "half a query": lambda number: _query(number, lambda number: struct.pack("<Q", 40) + b"k" * (number % 40)),
    "a query of random bytes": lambda number: _query(number, lambda number: secrets.token_bytes(1 + number % 60)),
    "a huge length": lambda number: _query(number, lambda number: struct.pack("<Q", HUGE[number % len(HUGE)])),
    "a huge second length": lambda number: _query(
        number, lambda number: struct.pack("<Q1sQ", 1, b"k", HUGE[number % len(HUGE)])
    ),
    "a huge number of keys": lambda number: _query(number, lambda number: struct.pack("<QQ", 2**40, 2**40)),
}


def throw(address: str, pieces: int, ports: list[int], forms: list[str] | None = None) -> dict[str, int]:
    """Each piece in a connection of its own, at the ports in turn."""
    kinds = [FORMS[form] for form in forms or FORMS]
    taken, refused, held = 0, 0, []
    for number in range(pieces):
        try:
            stranger = socket.create_connection((address, ports[number // len(kinds) % len(ports)]), LIMIT_S)
        except OSError:
            refused += 1
            continue
        with contextlib.suppress(OSError):  # it was closed meanwhile: a good answer
            stranger.sendall(kinds[number % len(kinds)](number // len(kinds)))
        taken += 1
        if number % HELD_EVERY == 0:
            held.append(stranger)
        else:
            stranger.close()
        if len(held) > MOST_HELD:
            held.pop(0).close()
    return {"taken": taken, "refused": refused}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(throw(sys.argv[1], int(sys.argv[2]), [int(port) for port in sys.argv[3:]])))
