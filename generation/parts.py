"""Rows that are worked on in parts, each written at once: after a kill the same command goes on with the next part."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

FOLDER = "parts"


class Parts:
    """The same parts on any number of devices, because what runs at once decides the last bits of a log-prob.

    Args:
        folder: of the job's output.
        count: rows in all.
        size: rows of a part.
    """

    def __init__(self, folder: Path, count: int, size: int):
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"

    def missing(self, accelerator) -> list[int]:
        """Numbers of this rank's parts that are not there yet."""
        mine = range(accelerator.process_index, len(self.ranges), accelerator.num_processes)
        return [number for number in mine if not self._file(number).is_file()]

    def work(self, accelerator, stop, make: Callable[[range], list[dict]]) -> None:
        """Make and write this rank's missing parts.

        Args:
            stop: a `StopOnSignal`, asked between two parts.
            make: the JSON rows of a part.
        """
        shown = {"unit": "part", "disable": not accelerator.is_main_process, "dynamic_ncols": True}
        for number in tqdm(self.missing(accelerator), **shown):
            if stop.asked:
                return
            text = "".join(f"{json.dumps(row)}\n" for row in make(self.ranges[number]))
            aside = self._file(number).with_suffix(".tmp")
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self._file(number))

    def first(self) -> list[dict] | None:
        """The rows of the first part, once it is there."""
        return _rows(self._file(0)) if self._file(0).is_file() else None

    def read(self) -> list[dict]:
        """All rows in order, once every part is there."""
        return [row for number in range(len(self.ranges)) for row in _rows(self._file(number))]


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
