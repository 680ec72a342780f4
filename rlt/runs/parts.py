"""Rows that are worked on in parts, each written at once: after a kill the same command goes on with the next part.

What the parts are made from is written beside them: a later life goes on with the same weights, rows and format only.
Importing this module is quick: plan.py asks for the weights before anything heavy is loaded.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlt.durable import as_json_lines, read_json, read_json_lines, write_whole
from rlt.errors import Refused
from rlt.prompts.styles import ReasoningFormat
from rlt.runs.folder import PARTS

SOURCES = "sources.json"
SUM = "sha256 of the rows above"  # the last line of a part
MODELS = ("model_name_or_path", "student_model", "teacher_model")
WEIGHTS = ("*.safetensors", "adapter_model.*")
END_BYTES = 2**20
# Not the rendered prompts, which follow from these, the format and the model's template.
ASKED = ("question", "solution", "teacher_system_prompt", "student_system_prompt")
WHAT = {"dataset_id_or_path": "the questions", "reasoning_format": "the tags or prompts"}  # else the weights
MOST_AT_ONCE, DEVICES = 32, 8


def part_size(count: int) -> int:
    """Rows of a part, from their number alone, so that the eight devices of a machine have a part each.

    A smaller part leaves one device with fewer sequences at once: `questions_at_once` may name another number.
    """
    return max(1, min(MOST_AT_ONCE, -(-count // DEVICES)))


class Parts:
    """Rows in parts of a fixed size, whatever the number of devices.

    Which rows run together decides the last bits of a log-prob.

    Args:
        folder: of the job's output.
        count: rows in all.
        size: rows of a part; None: `part_size` of them.
    """

    def __init__(self, folder: Path, count: int, size: int | None):
        size = size or part_size(count)
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self.folder = folder / PARTS
        self.folder.mkdir(exist_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"

    def keep_to(self, accelerator, config: dict[str, Any], rows: list[dict], style: ReasoningFormat) -> None:
        """Together with all ranks: note what the parts are made from, or see that it is still the same.

        Raises:
            Refused: on every rank, as `check_parts`.
        """
        from accelerate.utils import broadcast_object_list

        refusal = [None]
        if accelerator.is_main_process:
            now = made_from(config, rows, style)
            try:
                check_parts(config, now)
                write_whole(self.folder / SOURCES, json.dumps(now, indent=1))
            except Refused as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise Refused(refusal[0])

    def missing(self, accelerator) -> list[int]:
        """Numbers of this rank's parts that are not there yet."""
        mine = range(accelerator.process_index, len(self.ranges), accelerator.num_processes)
        return [number for number in mine if self._rows(number) is None]

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
            rows = make(self.ranges[number])
            write_whole(self._file(number), as_json_lines([*rows, {SUM: _hash(rows)}]))

    def first(self) -> list[dict] | None:
        """The rows of the first part, once it is there."""
        return self._rows(0)

    def read(self) -> list[dict]:
        """All rows in order, once every part is there."""
        return [row for number in range(len(self.ranges)) for row in self._rows(number) or ()]

    def _rows(self, number: int) -> list[dict] | None:
        """Of a part that is there as it was written; another is made again."""
        *rows, last = read_json_lines(self._file(number)) or [{}]
        return rows if last == {SUM: _hash(rows)} else None


def made_from(config: dict[str, Any], rows: list[dict], style: ReasoningFormat) -> dict[str, Any]:
    """What decides a job's parts beside its configuration, by the key that names it."""
    asked = [[row.get(column) for column in ASKED] for row in rows]
    return {**models_of(config), "dataset_id_or_path": _hash(asked), "reasoning_format": _hash(asdict(style))}


def models_of(config: dict[str, Any]) -> dict[str, dict]:
    """Size and a hash of the end of each weight file of the models that are local folders, by key."""
    return {key: _weights(Path(config[key]).expanduser()) for key in MODELS if config.get(key)}


def _weights(folder: Path) -> dict[str, list]:
    return {file.name: _size_and_end(file) for pattern in WEIGHTS for file in sorted(folder.glob(pattern))}


def _size_and_end(file: Path) -> list:
    """Not the whole file, which may have gigabytes; training moves every weight."""
    size = file.stat().st_size
    with file.open("rb") as content:
        content.seek(max(0, size - END_BYTES))
        return [size, sha256(content.read()).hexdigest()]


def check_parts(config: dict[str, Any], now: dict[str, Any]) -> None:
    """That a job's parts, where there are some, were made from what is there now.

    Args:
        now: of `made_from`, or of `models_of` to ask for the weights alone.

    Raises:
        Refused: they were not; names the first key behind which something else stands, and the remedy.
    """
    folder = Path(config["output_dir"]) / PARTS
    noted = folder / SOURCES
    if config["overwrite_output_dir"] or not any(folder.glob("*.jsonl")):
        return
    before = read_json(noted)
    if before is None:
        return
    changed = [key for key, what in now.items() if what and before.get(key) != what]  # nothing: a hub's, or deleted
    if changed:
        what = WHAT.get(changed[0], "the weights")
        raise Refused(
            f"output_dir={config['output_dir']}: {what} of {changed[0]}={config[changed[0]]} changed after its first "
            "part was made: overwrite_output_dir=true starts again, or choose another output_dir"
        )


def _hash(content: Any) -> str:
    return sha256(json.dumps(content).encode()).hexdigest()
