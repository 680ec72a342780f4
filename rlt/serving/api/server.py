"""The HTTP server: a signal ends it, and leaves the process to close what is behind it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import uvicorn

from rlt.launching.lifetime import stop_signals


class Server(uvicorn.Server):
    """Ends on SIGTERM, Ctrl-C or a lost terminal, once answers on their way are given."""

    def capture_signals(self) -> nullcontext[None]:  # pyrefly: ignore[bad-override]
        """Not uvicorn's: it raises the signal once more at its end, which ends the process before its workers."""
        return nullcontext()

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Also for signals before it serves: it then ends as soon as it has begun."""
        loop, numbers = asyncio.get_running_loop(), stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:  # another one ends the process at once, whatever is still being closed
                loop.remove_signal_handler(number)
