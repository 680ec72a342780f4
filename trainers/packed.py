"""Packed rows of a preparation as a trainer reads them.

B rows of a micro-batch, T tokens of the longest, padding included.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset

from rlt.durable import digest
from rlt.errors import Refused
from rlt.preparation.split import TRAIN, VALIDATION
from rlt.preparation.tokenizers import fingerprint_of
from rlt.preparation.tokens import CHAT, TEACHER
from rlt.runs.folder import PACKED, PREPARED, TOKENIZER, TOKENS
from rlt.schema import SFTSettings, StudentSettings
from rlt.tokens.bins import best_fit_decreasing
from rlt.tokens.files import array_files, notes_of, read_arrays

logger = logging.getLogger("rlt")

IGNORED = -100  # a label without a loss
READ_AT_MOST = 2**30  # tokens whose frequencies are counted


def packed_files(folder: str | Path, split: str) -> list[Path]:
    """The packed rows of a preparation's output folder; none where it has no such stage."""
    return array_files(Path(folder).expanduser() / PACKED, split)


def packed_files_for(settings: SFTSettings) -> list[Path]:
    """The packed rows that a run of supervised fine-tuning takes; none where it takes rows instead.

    A teacher's answers are thoughts, so it takes those alone that were made so (`tokens_as=teacher`).

    Raises:
        Refused: there are others for the learner, and no rows.
    """
    folder, learner = settings.dataset_id_or_path, settings.profile.learner
    if not (files := packed_files(folder, TRAIN)):
        return []
    made_as = notes_of(files[0]).get("tokens_as", CHAT)
    if (made_as == TEACHER) == (learner == TEACHER):
        logger.info("the rows of %s/%s are trained on, as they were packed (tokens_as=%s)", folder, PACKED, made_as)
        return files
    if not (Path(folder).expanduser() / PREPARED).is_dir():
        raise Refused(
            f"{folder} holds rows packed with tokens_as={made_as} alone, and a {learner} is trained: prepare them with "
            f"tokens_as={learner}, or with stage write"
        )
    logger.info("the rows of %s/%s are trained on: packed ones have tokens_as=%s", folder, PREPARED, made_as)
    return []


def packed_rows(files: list[Path], cache: Path) -> Dataset:
    """The rows, on the disk; `cache` is a folder of the run's own.

    Raises:
        Refused: there is no row.
    """
    rows = Dataset.from_parquet([str(path) for path in files], cache_dir=str(cache))
    assert isinstance(rows, Dataset)
    if not len(rows):
        raise Refused(f"{files[0].parent} holds no packed row")
    return rows.with_format("numpy")


def first_rows(rows: Dataset, size: int | None, key: str) -> Dataset:
    """At most so many of them; says what is left out."""
    if size is None or len(rows) <= size:
        return rows
    logger.warning("%s=%d leaves %d of %d packed rows out", key, size, len(rows) - size, len(rows))
    return rows.select(range(size))  # pyrefly: ignore[bad-return]


def check_made_for(files: list[Path], tokenizer: Any, max_length: int | None) -> None:
    """That the model reads the tokens as they are meant.

    Raises:
        Refused: the rows are of another vocabulary, or longer.
    """
    notes = notes_of(files[0])
    if notes["tokenizer"] != fingerprint_of(tokenizer):
        raise Refused(
            f"{files[0].parent} holds tokens of {notes['tokenizer_name']}, and the model's tokenizer has another "
            f"vocabulary, other cuts or another chat template: prepare the rows with tokenizer={tokenizer.name_or_path}"
        )
    if max_length is not None and int(notes["pack_length"]) > max_length:
        have = notes["pack_length"]
        raise Refused(
            f"max_length={max_length}: the packed rows of {files[0].parent} have {have}, set max_length={have}"
        )


def check_packed(settings: SFTSettings) -> None:
    """What a run on packed rows has no rows for.

    Raises:
        Refused: the key that asks for them.
    """
    folder = settings.dataset_id_or_path
    if isinstance(settings, StudentSettings) and settings.eval_answers:
        raise Refused(f"eval_answers with packed rows of {folder}, which hold no questions: set eval_answers=0")
    if (other := settings.eval_dataset_id_or_path) is not None:
        raise Refused(f"eval_dataset_id_or_path={other} with packed rows of {folder}, which hold out some of their own")
    if settings.eval_size and not packed_files(folder, VALIDATION):
        raise Refused(f"eval_size={settings.eval_size}: {folder} holds nothing out; prepare it with validation_share")


def tokenizer_of(files: list[Path]) -> str:
    """The name of the tokenizer that packed rows were made with: a model's, or the folder of one trained for them."""
    name = notes_of(files[0])["tokenizer_name"]
    return str(files[0].parent.parent / TOKENIZER) if name == TOKENIZER else name


def identity_of_files(files: list[Path]) -> list[dict[str, str]]:
    """What says whether a later life of a run has the same rows."""
    return [{"file": path.name, "sha256": digest(path)} for path in files]


class PackedCollator:
    """A micro-batch of packed rows: `input_ids`, `labels`, `position_ids`, `attention_mask` (B, T).

    Positions begin again with each sequence. A sequence's first token has no label: nothing comes before it.

    Args:
        padding: the token that rows are filled with, on the right; it has no label.
        whole: fill up to the length that a row was packed for, so that shapes are few.
    """

    def __init__(self, padding: int, whole: bool = False):
        self.padding, self.whole = padding, whole

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(int(row["bucket"]) if self.whole else len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": numpy.full((len(rows), width), self.padding, dtype=numpy.int64),
            "labels": numpy.full((len(rows), width), IGNORED, dtype=numpy.int64),
            "position_ids": numpy.zeros((len(rows), width), dtype=numpy.int64),
            "attention_mask": numpy.zeros((len(rows), width), dtype=numpy.int64),
        }
        for number, row in enumerate(rows):
            ids, lengths = numpy.asarray(row["input_ids"]), numpy.asarray(row["seq_lengths"])
            labels = numpy.where(row["loss_mask"], ids, IGNORED)
            labels[numpy.cumsum(lengths) - lengths] = IGNORED
            end = len(ids)
            batch["input_ids"][number, :end], batch["labels"][number, :end] = ids, labels
            batch["attention_mask"][number, :end] = 1
            batch["position_ids"][number] = _positions([*lengths, width - end])
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _positions(lengths: Sequence[int]) -> numpy.ndarray:
    """0, 1, ... for each sequence anew."""
    starts = numpy.cumsum(lengths) - lengths
    return numpy.arange(sum(lengths)) - numpy.repeat(starts, lengths)


def sequences_of(inputs: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The sequences of a micro-batch, and the indices in each of the tokens that have a label.

    Rows without `position_ids` are one sequence each.
    """
    sequences, counted = [], []
    for number, mask in enumerate(inputs["attention_mask"].bool()):
        ids, labels = inputs["input_ids"][number][mask], inputs["labels"][number][mask]
        if "position_ids" in inputs:
            starts = (inputs["position_ids"][number][mask] == 0).nonzero().flatten()[1:].cpu()
        else:
            starts = torch.zeros(0, dtype=torch.long)
        sequences += [part.tolist() for part in ids.tensor_split(starts)]
        counted += [(part != IGNORED).nonzero().flatten().tolist() for part in labels.tensor_split(starts)]
    return sequences, counted


def held_out_by_source(folder: Path, rows: int, max_length: int) -> dict[str, Dataset]:
    """Packed rows of each source's held-out sequences, at most so many of each.

    Longer sequences are left out, which is said.

    Raises:
        Refused: nothing is held out.
    """
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    room: dict[str, int] = defaultdict(lambda: rows * max_length)
    left_out: Counter[str] = Counter()
    for path in array_files(folder / TOKENS, VALIDATION):
        for row in read_arrays(path):
            source = row["source"]
            if row["length"] > max_length:
                left_out[source] += 1
            elif row["length"] <= room[source]:
                held[source].append(row)
                room[source] -= row["length"]
    for source, count in sorted(left_out.items()):
        logger.warning(
            "%s: %d held-out sequences are longer than max_length=%d and left out", source, count, max_length
        )
    if not held:
        raise Refused(f"eval_size={rows}: {folder} holds nothing out, prepare it with validation_share, or set 0")
    return {source: _packed(some, max_length) for source, some in sorted(held.items())}


def _packed(rows: list[dict[str, Any]], max_length: int) -> Dataset:
    made = []
    for one in best_fit_decreasing([row["length"] for row in rows], [max_length]):
        members = [rows[number] for number in one.members]
        arrays = {name: numpy.concatenate([m[name] for m in members]) for name in ("input_ids", "loss_mask")}
        made.append({**arrays, "seq_lengths": [m["length"] for m in members], "bucket": max_length})
    return Dataset.from_list(made).with_format("numpy")


def unigram_entropy(files: list[Path]) -> float:
    """Nats a token, of the trained ones: the loss of a model that knows how frequent tokens are and nothing else."""
    counts = numpy.zeros(0, dtype=numpy.int64)
    for ids in _trained(files):
        found = numpy.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        if counts.sum() > READ_AT_MOST:
            break
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return -float((shares * numpy.log(shares)).sum())


def _trained(files: list[Path]) -> Iterator[numpy.ndarray]:
    for path in files:
        for row in read_arrays(path):
            yield row["input_ids"][row["loss_mask"].astype(bool)]
