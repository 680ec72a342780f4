"""Tokens a second of stage tokens beside the bare tokenizer, and how full rows are beside TRL's packing; one process.

TOKENIZERS_PARALLELISM=false PYTHONPATH=. python benchmarks/preparation_tokens.py
"""

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

from rlt.formats.corpora import corpus_rows
from rlt.formats.record import make_record, message
from rlt.preparation.pack import WINDOW, pieces
from rlt.preparation.stage import ROWS_AT_ONCE
from rlt.preparation.tokens import Encoder
from rlt.tokens.bins import best_fit_decreasing

CHATS, LENGTHS = 8000, 100_000
SETS = {"short chat": (5.3, 0.8), "reasoning": (7.2, 0.9)}  # of log-normal lengths


def seconds(work: Callable[[], int]) -> tuple[int, float]:
    """What it returns, and the processor's time."""
    begin = time.process_time()
    return work(), time.process_time() - begin


def say(what: str, tokens: int, took: float) -> None:
    sys.stdout.write(f"{what:<44} {tokens / took / 1e6:.2f} M tokens/s ({tokens} tokens, {took:.2f} s)\n")


def tokenise() -> None:
    encoder = Encoder("embedded/smollm2-135m-instruct")
    texts = [row["text"] for row in corpus_rows("kjv")]
    bare = encoder.tokenizer.backend_tokenizer
    say("tokenizers alone, texts", *seconds(lambda: sum(len(e.ids) for e in bare.encode_batch_fast(texts))))
    chats = [
        make_record("chat", messages=[message("user", text[:300]), message("assistant", text[300:1500])])
        for text in (texts * 9)[:CHATS]
    ]
    for name, records in (("texts", [make_record("text", text=text) for text in texts]), ("conversations", chats)):
        some = [records[start : start + ROWS_AT_ONCE] for start in range(0, len(records), ROWS_AT_ONCE)]
        work = lambda some=some: sum(len(row.ids) for batch in some for row in encoder(batch))  # noqa: E731
        say(f"stage tokens, {name}", *seconds(work))


def pack() -> None:
    for name, (mean, spread) in SETS.items():
        drawn = numpy.random.default_rng(0).lognormal(mean, spread, LENGTHS).astype(int) + 1
        for size in (2048, 8192):
            lengths = [piece for length in drawn.tolist() for piece in pieces(length, [size])]
            windows = [lengths[start : start + WINDOW] for start in range(0, len(lengths), WINDOW)]
            rows, took = seconds(lambda: sum(len(best_fit_decreasing(w, [size])) for w in windows))  # noqa: B023
            whole = Dataset.from_dict({"input_ids": [numpy.zeros(length, numpy.int8) for length in lengths]})
            theirs, trl = seconds(lambda: len(pack_dataset(whole, size, "bfd")))  # noqa: B023
            total = sum(lengths)
            sys.stdout.write(
                f"{name}, {size}: utilisation {total / rows / size:.4f}, TRL's {total / theirs / size:.4f}; "
                f"{len(lengths) / took / 1e6:.2f} M sequences/s by length alone, TRL {len(lengths) / trl / 1e6:.2f} "
                "with their tokens\n"
            )


if __name__ == "__main__":
    disable_progress_bars()
    tokenise()
    pack()
