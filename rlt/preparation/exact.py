"""Exact duplicates, over all sources: of records that say the same the first is kept; by key, of one prompt some.

Two records say the same where their texts have one normal form (normal.py) and all else of them is equal: text, or
messages with tools, answer and tests. A record without a letter of text is no duplicate of anything. `same_prompt`
counts answers of one prompt among what is left; records of plain text have no prompt.
"""

from itertools import islice

import numpy as np

from rlt.errors import Refused
from rlt.formats.record import Record, prompt_of
from rlt.preparation.normal import record_hashes, text_hashes
from rlt.preparation.order import ORDER, Order
from rlt.preparation.spill import VERDICT, Verdicts, spilled, spilling
from rlt.preparation.stage import CorpusStage, Pass, Task

PARTS = 256  # of the hashes: one at a time is held in memory
HASH = [("high", "<u8"), ("low", "<u8")]
ENTRY = np.dtype([*[(f"prompt_{n}", t) for n, t in HASH], *HASH, *ORDER.descr, ("shard", "<u4"), ("row", "<u4")])
FOUND = np.dtype([*VERDICT.descr, ("shard", "<u4")])
REASONS = ("exact duplicate", "another answer to one prompt")
ROWS_AT_ONCE = 128
KEEP_ALL, KEEP_FIRST = "keep_all", "keep_first"


def answers_kept(same_prompt: str | int) -> int | None:
    """Of each prompt; None: all.

    Raises:
        Refused: it is neither a policy nor a number.
    """
    if same_prompt == KEEP_ALL:
        return None
    number = "1" if same_prompt == KEEP_FIRST else str(same_prompt)
    if not number.isdigit() or int(number) < 1:
        raise Refused(f"same_prompt={same_prompt}: use {KEEP_ALL}, {KEEP_FIRST}, or how many answers are kept")
    return int(number)


class Exact(CorpusStage):
    """Drops what says the same as an earlier row."""

    name = "exact"
    keys = ("same_prompt",)

    def check(self) -> None:
        answers_kept(self.settings.same_prompt)

    def decisions(self) -> list[Pass]:
        return [Pass("hashes", self.hashes), Pass("first", self.first)]

    def hashes(self, task: Task) -> None:
        """Of each row, to the part that its prompt's hash says; without a prompt that counts, its own."""
        order, rows, row = Order(self.settings), task.rows(), 0
        by_prompt = answers_kept(self.settings.same_prompt) is not None
        with spilling(task.place.work / "hashes", task.number, PARTS) as spill:
            while some := list(islice(rows, ROWS_AT_ONCE)):
                entries = entries_of(some, order, by_prompt, task.number, row)
                spill(entries, entries["prompt_high"] % PARTS)
                row += len(some)

    def first(self, task: Task) -> None:
        """Some parts: which rows are not the first ones, for each shard to know."""
        answers = answers_kept(self.settings.same_prompt)
        with spilling(task.place.work / "doubles", task.number, self.settings.engine_tasks) as spill:
            for part in range(task.number, PARTS, task.of):
                found = doubles(spilled(task.place.work / "hashes", part, ENTRY), answers)
                spill(found, found["shard"])

    def verdicts(self, task: Task) -> Verdicts:
        return Verdicts(spilled(task.place.work / "doubles", task.number, FOUND), REASONS)


def entries_of(records: list[Record], order: Order, by_prompt: bool, shard: int, row: int) -> np.ndarray:
    """One for each record that has a text; `row` is the first one's number."""
    whole = record_hashes(records)
    asked = text_hashes([prompt_of(record) for record in records]) if by_prompt else [None] * len(records)
    kept = [n for n, digest in enumerate(whole) if digest]
    entries = np.empty(len(kept), ENTRY)
    entries["high"], entries["low"] = _halves([whole[n] for n in kept])
    prompts = [asked[n] or _not(whole[n]) for n in kept]  # without a prompt that counts: one that no other row has
    entries["prompt_high"], entries["prompt_low"] = _halves(prompts)
    if kept:
        entries["source"], entries["number"], entries["id"] = zip(*(order.of(records[n]) for n in kept), strict=True)
    entries["shard"], entries["row"] = shard, np.array(kept, dtype=np.uint32) + np.uint32(row)
    return entries


def _not(digest: bytes | None) -> bytes:
    return bytes(255 - byte for byte in digest or b"")


def _halves(digests: list) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def doubles(entries: np.ndarray, answers: int | None) -> np.ndarray:
    """What is dropped of a part, whose hashes stand in no other."""
    place = ("row", "shard", "id", "number", "source")  # the last key is the first that decides
    entries = entries[np.lexsort([entries[key] for key in (*place, "low", "high")])]
    again = np.zeros(len(entries), bool)
    again[1:] = _as_before(entries, "high", "low")
    found = [_verdicts(entries[again], 0)]
    if answers is not None:
        left = entries[~again]
        left = left[np.lexsort([left[key] for key in (*place, "prompt_low", "prompt_high")])]
        found.append(_verdicts(left[_rank(left) >= answers], 1))
    return np.concatenate(found)


def _as_before(entries: np.ndarray, *keys: str) -> np.ndarray:
    """Of each but the first, whether it equals the one before it in all keys."""
    return np.logical_and.reduce([entries[key][1:] == entries[key][:-1] for key in keys])


def _rank(entries: np.ndarray) -> np.ndarray:
    """How many of the same prompt stand before each."""
    new = np.ones(len(entries), bool)
    new[1:] = ~_as_before(entries, "prompt_high", "prompt_low")
    starts = np.flatnonzero(new)
    return np.arange(len(entries)) - starts[np.cumsum(new) - 1] if len(entries) else starts


def _verdicts(entries: np.ndarray, reason: int) -> np.ndarray:
    found = np.empty(len(entries), FOUND)
    found["row"], found["shard"] = entries["row"], entries["shard"]
    found["reason"], found["score"] = reason, np.nan
    return found
