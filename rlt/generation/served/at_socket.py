"""vLLM's server at a socket that its launcher holds: `python -m rlt.generation.served.at_socket FD ARGUMENTS`.

vLLM would bind the port itself, some ten seconds after its launcher has named it, and again after each of its deaths:
whoever took it meanwhile would be shown the key.
"""

import socket
import sys

from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server.entry import main as serve


class HeldServer(launcher.NoSignalServer):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Overridden: requests to a server that died wait in the socket, though who asked has given up: to end itself,
        # to pause, to take weights. They are not for the one that starts.
        for held in sockets or ():
            drop_waiting(held)
        await super().startup(sockets)


def drop_waiting(held: socket.socket) -> None:
    """Close the connections that nobody has accepted."""
    held.setblocking(False)
    while True:
        try:
            waiting, _ = held.accept()
        except BlockingIOError:
            return
        waiting.close()


def main() -> None:
    held = socket.socket(fileno=int(sys.argv.pop(1)))
    launcher.create_server_socket = lambda *_, **__: held  # which `setup_server` calls
    launcher.NoSignalServer = HeldServer  # which `serve_http` makes
    serve()


if __name__ == "__main__":
    main()
