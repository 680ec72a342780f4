"""vLLM's server at a socket that its launcher holds: `python -m rlt.generation.served.at_socket FD ARGUMENTS`.

vLLM would bind the port itself, some ten seconds after its launcher has named it, and again after each of its deaths:
whoever took it meanwhile would be shown the key.
"""

import socket
import sys

from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server.entry import main as serve


def main() -> None:
    held = socket.socket(fileno=int(sys.argv.pop(1)))
    launcher.create_server_socket = lambda *_, **__: held  # which `setup_server` calls
    serve()


if __name__ == "__main__":
    main()
