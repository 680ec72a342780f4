"""One bar per pass, from the notes that tasks leave: rows, rows per second, time left."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

EVERY_S = 0.5


def _noted(folder: Path, pass_name: str) -> int:
    total = 0
    for path in folder.glob(f"{pass_name}-*"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        total += int(text) if text.isdigit() else 0
    return total


@contextmanager
def bar(folder: Path, stage: str, pass_name: str, total: int | None, unit: str = "row") -> Iterator[None]:
    """While the block runs.

    Args:
        folder: where tasks note how far they have come.
        total: rows that come in; None: not known.
    """
    ended = threading.Event()
    title = stage if pass_name in ("rows", stage) else f"{stage}, {pass_name}"
    scaled = unit == "B"
    look = {"unit": unit, "unit_scale": scaled, "dynamic_ncols": True, "leave": False}
    with tqdm(total=total, desc=title, disable=None, **look) as shown:  # None: where there is no terminal

        def watch() -> None:
            while not ended.wait(EVERY_S):
                shown.update(max(0, _noted(folder, pass_name) - shown.n))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
