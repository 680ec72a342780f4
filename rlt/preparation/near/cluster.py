"""Which of rows that are alike are kept: the best, and whatever is like none that is kept.

Rows are taken in order of preference. A row is dropped if it is verified to be like a kept one, whatever chain of
others leads from one to the other: of A ~ B ~ C, where A and C are not alike and A is the best, B goes and C stays. So
no component melts away, and every dropped row has a kept one that it was compared with.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 2**12


@dataclass(frozen=True)
class Kept:
    """What became of the rows that are like another.

    Args:
        places: of all of them, sorted.
        similarity: to the kept row that is most like it; NaN of a row that is kept.
        components: of rows that a chain of pairs joins: how many, `largest` of how many rows.
        chained: rows kept beside another of their component.
    """

    places: np.ndarray
    similarity: np.ndarray
    components: int
    largest: int
    chained: int


def in_blocks(*columns: np.ndarray) -> Iterator[tuple]:
    """Rows of some columns, as Python's numbers; these take several times the memory, so a block of them at a time."""
    for start in range(0, len(columns[0]), BLOCK):
        yield from zip(*(column[start : start + BLOCK].tolist() for column in columns), strict=True)


def components(pairs: np.ndarray, count: int) -> np.ndarray:
    """(count,) the least member of each one's component: union-find with path halving.

    Args:
        pairs: (n, 2) numbers below `count`.
    """
    parent = array("q", range(count))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for a, b in in_blocks(pairs[:, 0], pairs[:, 1]):
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    return np.fromiter(map(root, range(count)), np.int64, count)


def keep_best(places: np.ndarray, edges: np.ndarray, rank: np.ndarray) -> Kept:
    """Decide.

    Args:
        places: of all rows that are in an edge, sorted.
        edges: EDGE rows.
        rank: of each place, its number in order of preference.
    """
    a, b = np.searchsorted(places, edges["a"]), np.searchsorted(places, edges["b"])
    swap = rank[a] > rank[b]
    better, worse = np.where(swap, b, a), np.where(swap, a, b)
    order = np.argsort(rank[better], kind="stable")
    like = np.full(len(places), np.nan)
    for one, other, value in in_blocks(better[order], worse[order], edges["similarity"][order]):
        if np.isnan(like[one]):  # all edges to better rows came before
            like[other] = np.fmax(like[other], value)
    of = components(np.stack([a, b], axis=1), len(places))
    sizes = np.bincount(of)
    kept = np.bincount(of[np.isnan(like)], minlength=len(sizes))
    return Kept(places, like, int((sizes > 0).sum()), int(sizes.max(initial=0)), int(np.maximum(kept - 1, 0).sum()))
