"""Which two rows are worth a look: they agree in a band of their signatures, or share one of their rarest runs.

Bands find a pair of J = 0.8 with probability 0.92, of 0.9 with 0.9999, and which they miss depends on the signature.
Rare runs miss none (prefix filtering: Chaudhuri et al. 2006; Bayardo et al. 2007): put every set in one order, rarest
first; two sets with J >= t share one of their first n - ceil(t n) + 1. So what is kept is the same for all signatures,
and how many pairs bands alone would have found is noted. What thousands of rows share (a header, a licence) stands at
the end of that order: it makes no two of them a pair.

Both hold up to a crowd: of more than ALL_PAIRS rows that share a rare run, as those of one template do, each is looked
at with the best ones alone, or with whom a band adds. There rows that are alike may both be kept, and which of them
are depends a little on the signature; how many pairs were passed over is noted, once for each run they share.
"""

import numpy as np

from rlt.preparation.near.shingle import Sets, preferred
from rlt.preparation.near.signature import BANDS, ROWS
from rlt.preparation.words import BASE, mixed

ENTRY = np.dtype([("token", "<u8"), ("place", "<u8")])
PAIR = np.dtype([("a", "<u8"), ("b", "<u8"), ("path", "u1")])
BY_BAND, BY_RARE = 1, 2  # how a pair was found; both: 3
SLOTS = 2**22  # of the table of how many rows have a run; two runs may share a slot
MOST = 255  # that it counts to
ALL_PAIRS = 64  # rows that share a token, up to which each is looked at with each; of more, with the best ones
LEADERS = 8  # the fewest that these are


def band_tokens(signatures: np.ndarray) -> np.ndarray:
    """(sets, K) uint32 to (sets, BANDS) uint64: a hash of each band's columns, and of which band it is."""
    columns = signatures.reshape(len(signatures), BANDS, ROWS).astype(np.uint64)
    total = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), columns.shape[:2]).copy()
    for row in range(ROWS):
        total = mixed(total * BASE + columns[:, :, row])
    return total


def slots(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64(SLOTS - 1)).astype(np.int64)


def rare_tokens(
    hashes: np.ndarray, sizes: np.ndarray, table: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rarest runs of some sets, but those that no other row has; and whose they are.

    Args:
        hashes: of all sets, one after the other; `sizes` long.
        table: in how many rows the runs of each slot are, at most MOST.

    Returns:
        (tokens, number of its set), each (entries,).
    """
    of = np.repeat(np.arange(len(sizes)), sizes)
    rows_with = table[slots(hashes)]
    shared = rows_with > 1
    prefix = sizes - np.ceil(similarity * sizes - 1e-9).astype(np.int64) + 1
    left = prefix - np.bincount(of[~shared], minlength=len(sizes))  # what only this row has comes first
    chosen = np.flatnonzero(shared & (left[of] > 0))
    chosen = chosen[np.lexsort((hashes[chosen], rows_with[chosen], of[chosen]))]
    counts = np.bincount(of[chosen], minlength=len(sizes))
    rank = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = chosen[rank < left[of[chosen]]]
    return hashes[chosen], of[chosen]


def pairs_of(entries: np.ndarray, sets: Sets, similarity: float, in_group: bool, path: int) -> tuple[np.ndarray, int]:
    """Rows that share a token, each pair once; and how many pairs of crowded tokens were passed over.

    Args:
        in_group: whether two of one group are a pair.
    """
    entries, infos, starts = _shared(entries, sets)
    if not len(entries):
        return np.empty(0, PAIR), 0
    crowd = np.diff(np.append(starts, len(entries)))
    leaders = np.where(crowd <= ALL_PAIRS, crowd, np.maximum(LEADERS, ALL_PAIRS**2 // crowd))
    token = np.repeat(np.arange(len(starts)), crowd)
    left = np.flatnonzero(np.arange(len(entries)) - starts[token] < leaders[token])
    found, lag, made = [], 1, 0
    while len(left := left[left + lag < len(entries)]):
        left = left[token[left + lag] == token[left]]
        made += len(left)
        found.append(_likely(left, left + lag, infos, similarity, in_group))
        lag += 1
    first, second = (np.concatenate(side) for side in zip(*found, strict=True))
    pairs = np.empty(len(first), PAIR)
    a, b = entries["place"][first], entries["place"][second]
    pairs["a"], pairs["b"], pairs["path"] = np.minimum(a, b), np.maximum(a, b), path
    return merged(pairs), int((crowd * (crowd - 1) // 2).sum()) - made


def _shared(entries: np.ndarray, sets: Sets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of tokens that two rows have, the best row first; their INFO; where each token begins."""
    _, of, count = np.unique(entries["token"], return_inverse=True, return_counts=True)
    entries = entries[count[of] > 1]
    infos = sets.info(entries["place"])
    order = np.lexsort([*preferred(infos), entries["token"]])
    entries, infos = entries[order], infos[order]
    new = np.ones(len(entries), bool)
    new[1:] = entries["token"][1:] != entries["token"][:-1]
    return entries, infos, np.flatnonzero(new)


def _likely(
    a: np.ndarray, b: np.ndarray, infos: np.ndarray, similarity: float, in_group: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Those whose sizes allow the similarity, and whose groups allow that they are a pair."""
    sizes = infos["size"][a].astype(np.int64), infos["size"][b].astype(np.int64)
    likely = np.minimum(*sizes) >= similarity * np.maximum(*sizes) - 1e-9
    if not in_group:
        likely &= (infos["group"][a] == 0) | (infos["group"][a] != infos["group"][b])
    return a[likely], b[likely]


def merged(pairs: np.ndarray) -> np.ndarray:
    """Each pair once, sorted, with all the ways in which it was found."""
    pairs = pairs[np.lexsort((pairs["b"], pairs["a"]))]
    if not len(pairs):
        return pairs
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs["a"][1:] != pairs["a"][:-1]) | (pairs["b"][1:] != pairs["b"][:-1])
    starts = np.flatnonzero(new)
    path = np.bitwise_or.reduceat(pairs["path"], starts)
    pairs = pairs[starts]
    pairs["path"] = path
    return pairs
