"""How fast counters grew over the last minute."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW_S = 60.0
EVERY_S = 1.0  # between two marks


@dataclass(frozen=True)
class Rates:
    """By kind of request, a second."""

    tokens: dict[str, float]
    busy: dict[str, float]


@dataclass
class Marks:
    """What counters were at times of the last minute; `now` is also what makes a mark."""

    marks: deque[tuple[float, dict[str, float], dict[str, float]]] = field(default_factory=deque)

    def now(self, time_s: float, tokens: Mapping[str, float], busy: Mapping[str, float]) -> Rates:
        self.mark(time_s, tokens, busy)
        then, tokens_then, busy_then = self.marks[0]
        seconds = max(time_s - then, EVERY_S)
        return Rates(_growth(tokens, tokens_then, seconds), _growth(busy, busy_then, seconds))

    def mark(self, time_s: float, tokens: Mapping[str, float], busy: Mapping[str, float]) -> None:
        while len(self.marks) > 1 and self.marks[1][0] <= time_s - WINDOW_S:
            self.marks.popleft()
        if not self.marks or time_s - self.marks[-1][0] >= EVERY_S:
            self.marks.append((time_s, dict(tokens), dict(busy)))


def _growth(values: Mapping[str, float], before: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {kind: (value - before.get(kind, 0)) / seconds for kind, value in values.items()}
