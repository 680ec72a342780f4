"""How much of an evaluation item a text holds: the share of the item's word runs that stand in the text.

Runs are of 13 words; of questions of 8 to 12 words, of 8; shorter questions are looked for whole, and those under 5
words not at all, since any text has them. An answer is looked for where it is long enough to be an item's own. One hit
is no proof: of items checked by single hits, most "contaminated" sources of a public audit were false.
"""

from collections.abc import Iterable

import numpy as np

from rlt.formats.record import LISTS, Record
from rlt.preparation.evaluation_sets import Item
from rlt.preparation.words import Hashes, runs, words

LONG, MIDDLE, SHORT = 13, 8, 5  # words
ITEMS = 10  # a run that more items have is a template's
ROWS, ROWS_SHARE = 10, 0.001  # and one that more training rows have than both of these


def run_length(count: int) -> int | None:
    """Of a text of so many words: the length of the runs that are looked for."""
    if count >= LONG:
        return LONG
    if count >= MIDDLE:
        return MIDDLE
    return count if count >= SHORT else None


class Index:
    """The word runs of evaluation items, as hashes.

    Every key is a question, or an answer; `runs` are all keys' runs, sorted; entry p says that run `run_of[p]` is one
    of key `key_of[p]`.

    Args:
        masked: all numbers are one; then only what has 8 words counts, since templates are what is looked for.
    """

    def __init__(self, items: Iterable[Item], masked: bool = False):
        self.hashes = Hashes(masked)
        self.items: list[Item] = []  # of each key
        self.short = 0  # items whose questions are not looked for
        found: dict[bytes, np.ndarray] = {}
        for item in items:
            question, answer = self._runs(item.question, MIDDLE if masked else SHORT), self._runs(item.answer, LONG)
            self.short += question is None
            for one in (question, None if masked else answer):
                if one is not None and (key := one.tobytes()) not in found:
                    found[key] = one
                    self.items.append(item)
        flat = np.concatenate([*found.values(), np.empty(0, np.uint64)])
        self.key_of = np.repeat(np.arange(len(found)), [len(one) for one in found.values()])
        self.runs, self.run_of = np.unique(flat, return_inverse=True)
        self.lengths = sorted({self._length(item) for item in self.items} | {LONG})
        of_item = np.bincount(self.run_of, minlength=len(self.runs))
        self.counted = of_item[self.run_of] <= ITEMS  # of each entry

    def _length(self, item: Item) -> int:
        return run_length(len(words(item.question))) or LONG

    def _runs(self, text: str, least: int) -> np.ndarray | None:
        found = words(text)
        length = run_length(len(found))
        return None if length is None or len(found) < least else np.unique(runs(self.hashes.of(found), length))

    def ignore_common(self, rows_with: np.ndarray, rows: int) -> None:
        """What many training rows have counts no longer, unless it is most of a key: then that is what they hold.

        Args:
            rows_with: of each run, how many of `rows` training rows have it.
        """
        common = rows_with[self.run_of] > max(ROWS, ROWS_SHARE * rows)
        rare = self._sums(self.counted & ~common)
        mostly = 2 * rare < self._sums(self.counted)
        self.counted &= ~common | mostly[self.key_of]

    def _sums(self, entries: np.ndarray) -> np.ndarray:
        return np.bincount(self.key_of[entries], minlength=len(self.items))

    def found(self, streams: list[list[bytes]]) -> np.ndarray:
        """Which runs a record has, sorted: numbers into `runs`."""
        if not len(self.runs):
            return np.empty(0, np.int64)
        hashes = [self.hashes.of(stream) for stream in streams]
        own = np.concatenate([runs(one, length) for one in hashes for length in self.lengths])
        places = np.searchsorted(self.runs, own)
        places[places == len(self.runs)] = 0
        return np.unique(places[self.runs[places] == own])

    def shares(self, found: np.ndarray) -> np.ndarray:
        """Of each key, the share of its counted runs that are among `found`."""
        has = np.zeros(len(self.runs), bool)
        has[found] = True
        all_of, here = self._sums(self.counted), self._sums(self.counted & has[self.run_of])
        return here / np.maximum(all_of, 1)


def streams_of(record: Record) -> list[list[bytes]]:
    """A record's words, in order; and once more of each role that has more than one turn, without what is between."""
    if record["kind"] == "text":
        return [words(record["text"])]
    said: list[tuple[str, list[bytes]]] = []
    for turn in (turn for key in LISTS for turn in record[key] or ()):
        calls = [str(call["arguments"]) for call in turn["tool_calls"] or ()]
        text = "\n".join(filter(None, (turn["thinking"], turn["content"], *calls)))
        said.append((turn["role"], words(text)))
    rest = words("\n".join(filter(None, (record["answer"], record["tests"]))))
    streams = [[*(word for _, own in said for word in own), *rest]]
    for role in ("user", "assistant"):
        turns = [own for other, own in said if other == role]
        if len(turns) > 1:
            streams.append([word for own in turns for word in own])
    return streams


def has_choices(item: Item, streams: list[list[bytes]]) -> bool:
    """Whether two of an item's choices stand in the record; of an item without, true.

    A question of few words is asked everywhere ("Which of these is true?"): only its choices make it the item.
    """
    if not item.choices or len(words(item.question)) >= LONG:
        return True
    joined = b" " + b" ".join(streams[0]) + b" "
    return sum(b" " + b" ".join(words(choice)) + b" " in joined for choice in item.choices) >= 2
