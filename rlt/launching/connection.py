"""How a run's processes reach its servers: over HTTP at a port, or at a socket file on this machine (`unix:PATH`)."""

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

UNIX = "unix:"  # how the address of a socket file begins
LONGEST_SOCKET = 107  # bytes of its path (unix(7))
CONNECT_LIMIT_S = 10.0  # for a connection, however long the answer may take
SILENCE_S, PROBE_S = 60, 10  # a host that acknowledges nothing for so long is gone; how often a silent one is asked


def keep_alive() -> list[tuple[int, int, int]]:
    """Options of a connection (tcp(7)) by which a wait for an answer ends when the other host has lost its power."""
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S // PROBE_S),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000),
    ]


def open_client(url: str, limit_s: float) -> "httpx.Client":
    """A client of a server, without proxies and keys of the environment.

    Args:
        limit_s: for each answer; a connection has a limit of its own.
    """
    import httpx  # late, as every launch would wait for it

    limits = httpx.Timeout(limit_s, connect=min(limit_s, CONNECT_LIMIT_S))
    if url.startswith(UNIX):
        transport = httpx.HTTPTransport(uds=url.removeprefix(UNIX))
        return httpx.Client(base_url="http://server", transport=transport, timeout=limits, trust_env=False)
    secure = url.startswith("https:")  # else no certificates are read, which takes longer than a request
    transport = httpx.HTTPTransport(verify=secure, trust_env=False, socket_options=keep_alive())
    return httpx.Client(base_url=url, transport=transport, timeout=limits, trust_env=False)
