"""MinHash signatures of sets: K columns, each the least of a set's hashes under one function.

`numpy` is the reference: h = (a x + b) >> 32, a odd, all in wrapping 64 bits (multiply-shift). `torch` computes the
same numbers, on a GPU where there is one. `rensa` is the fastest on a CPU, with functions of its own (RMinHash over
the full set, its algorithm version 2). Two sets agree in a column with probability J, their Jaccard similarity.
"""

from collections.abc import Callable

import numpy as np
import xxhash

BANDS, ROWS = 14, 8  # two sets are looked at where all columns of a band agree: of J = 0.8, with probability 0.92
K = BANDS * ROWS
SEED = 1
CHUNK = {"cpu": 2**21, "cuda": 2**28}  # bytes of one step's numbers
HIGH = np.uint64(32)
Signer = Callable[[np.ndarray, np.ndarray], np.ndarray]  # hashes (N,), starts (sets + 1,) to (sets, K) uint32


def factors() -> tuple[np.ndarray, np.ndarray]:
    """a and b of each column, (K,) uint64."""
    a = [xxhash.xxh3_64_intdigest(b"a%d" % column, SEED) | 1 for column in range(K)]
    b = [xxhash.xxh3_64_intdigest(b"b%d" % column, SEED) for column in range(K)]
    return np.array(a, np.uint64), np.array(b, np.uint64)


def numpy_signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Column by column, so that a step's numbers stay in the cache."""
    found, buffer = np.empty((len(starts) - 1, K), np.uint32), np.empty_like(hashes)
    for column, (a, b) in enumerate(zip(*factors(), strict=True)):
        np.multiply(hashes, a, out=buffer)
        np.add(buffer, b, out=buffer)
        np.right_shift(buffer, HIGH, out=buffer)
        found[:, column] = np.minimum.reduceat(buffer, starts[:-1])
    return found


def rensa_signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    from rensa import RMinHash  # pyrefly: ignore[missing-module-attribute]

    rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.tolist(), K, SEED).to_rows()
    return np.array(rows, np.uint32)


def torch_signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """As many columns at once as CHUNK has room for; int64 wraps as uint64 does, and the sign's shift is masked."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_N = torch.from_numpy(hashes.view(np.int64)).to(device)
    sizes = np.diff(starts).tolist()
    a_K, b_K = (torch.from_numpy(factor.view(np.int64)).to(device) for factor in factors())
    columns, found = max(1, CHUNK[device] // (8 * len(hashes))), []
    for first in range(0, K, columns):
        a_C1, b_C1 = a_K[first : first + columns, None], b_K[first : first + columns, None]
        h_CN = (((a_C1 * x_N) + b_C1) >> 32) & 0xFFFFFFFF
        found.append(torch.stack([h_Cn.amin(1) for h_Cn in h_CN.split(sizes, dim=1)], dim=1).cpu())
    return torch.cat(found).T.numpy().astype(np.uint32)


SIGNATURES: dict[str, Signer] = {"rensa": rensa_signatures, "numpy": numpy_signatures, "torch": torch_signatures}
