"""Whether two rows are near duplicates: their sets' exact Jaccard similarity, intersection over union."""

from itertools import groupby

import numpy as np

from rlt.preparation.near.cluster import BLOCK, in_blocks
from rlt.preparation.near.shingle import Sets

EDGE = np.dtype([("a", "<u8"), ("b", "<u8"), ("path", "u1"), ("similarity", "<f4")])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted sets that are not empty."""
    if len(a) > len(b):
        a, b = b, a
    places = np.searchsorted(b, a)
    places[places == len(b)] = 0
    both = np.count_nonzero(b[places] == a)
    return both / (len(a) + len(b) - both)


def verified(pairs: np.ndarray, sets: Sets, similarity: float) -> np.ndarray:
    """The pairs (sorted by `a`) that are as similar as that, with their similarity."""
    found, blocks = [], [np.empty(0, EDGE)]
    columns = in_blocks(pairs["a"], pairs["b"], pairs["path"])
    for a, some in groupby(columns, key=lambda pair: pair[0]):
        one = np.array(sets.of(a))
        for _, b, path in some:
            if (value := jaccard(one, sets.of(b))) >= similarity:
                found.append((a, b, path, value))
        if len(found) >= BLOCK:
            blocks.append(np.array(found, EDGE))
            found = []
        sets.forget()
    return np.concatenate([*blocks, np.array(found, EDGE)])
