"""An engine that has requests and says nothing, while the HTTP side of its server answers on: as in a deadlock."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# A step of an engine takes less. With the time after which a launcher replaces a server that is not well (30 s), it is
# less than a client waits for a control call (60 s).
SILENCE_S = 20.0


class Silence:
    """How long an engine has owed somebody an answer. It says something after each of its steps.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.now = now
        self.heard = now()
        self.waiting = 0  # requests, of whatever kind
        self.paused = False  # while new weights come, requests wait
        self._listened_to: Any = None

    def of(self, engine: Any) -> float:
        """Seconds since it was last seen at work, or without work.

        Args:
            engine: vLLM's `AsyncLLM`.
        """
        if engine is not self._listened_to:
            self._listen_to(engine)
        if self.paused or not self.waiting:
            self.heard = self.now()
        return self.now() - self.heard

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While a request waits for its answer, or is given up."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def answered(self) -> None:
        """An answer to any request is a word, too."""
        self.heard = self.now()

    def _listen_to(self, engine: Any) -> None:
        """What comes from the engine's process passes here, also after a step that ended no request."""
        processor = engine.output_processor
        told = processor.update_scheduler_stats

        def hear(stats: Any) -> None:
            self.heard = self.now()
            told(stats)

        processor.update_scheduler_stats = hear
        self._listened_to = engine
