"""How a run's processes reach its servers: over HTTP at a port, or at a socket file on this machine (`unix:PATH`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

UNIX = "unix:"  # how the address of a socket file begins
LONGEST_SOCKET = 107  # bytes of its path (unix(7))


def open_client(url: str, limit_s: float) -> "httpx.Client":
    """A client of a server, without proxies and keys of the environment.

    Args:
        limit_s: for each answer.
    """
    import httpx  # late, as every launch would wait for it

    if url.startswith(UNIX):
        transport = httpx.HTTPTransport(uds=url.removeprefix(UNIX))
        return httpx.Client(base_url="http://server", transport=transport, timeout=limit_s, trust_env=False)
    secure = url.startswith("https:")  # else no certificates are read, which takes longer than a request
    return httpx.Client(base_url=url, verify=secure, timeout=limit_s, trust_env=False)
