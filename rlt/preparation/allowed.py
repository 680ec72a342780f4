"""Whether sources may be trained on: by their licence, and as none is an evaluation set that rows are checked by."""

import logging
import re
from pathlib import Path

from rlt.errors import Refused
from rlt.formats.inputs import Source, fingerprint
from rlt.preparation.evaluation_sets import file_of

# Words of a licence that forbid training, whatever else it says; letters and digits alone count.
FORBIDDEN = re.compile(
    r"\b(no ?ai|no (ai |model |ml )?training|no ml|not for training|(evaluation|eval|test|testing) only|no derivatives?"
    r"|cc by (nc )?nd|all rights reserved|proprietary)\b"
)
LIMITED = re.compile(r"\b(nc|non ?commercial|research only|academic only)\b")  # to uses that are not commercial

logger = logging.getLogger("rlt")


def check_allowed(inputs: list[tuple[Source, Path | None]], evaluation_sets: list[str]) -> None:
    """Warns of a licence that allows no commercial use.

    Raises:
        Refused: a source's licence forbids that a model is trained on it, or a file of it is one of `evaluation_sets`.
    """
    for source in {source.name: source for source, _ in inputs}.values():
        words = re.sub(r"[^a-z0-9]+", " ", (source.license or "").lower())
        if FORBIDDEN.search(words):
            raise Refused(
                f"sources: the licence of {source.name}, {source.license}, forbids to train on it: leave it out"
            )
        if LIMITED.search(words):
            logger.warning("the licence of %s, %s, allows no commercial use", source.name, source.license)
    for name in evaluation_sets:
        held = file_of(name)
        for source, path in inputs:
            if path is not None and same(path, held):
                raise Refused(f"sources: {path} of {source.name} is evaluation set {name}: no run trains on it")


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same content."""
    if one.resolve() == other.resolve():
        return True
    return one.stat().st_size == other.stat().st_size and fingerprint(one) == fingerprint(other)
