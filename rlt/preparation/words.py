"""What two texts are compared by: their words, as 64-bit hashes, and runs of n of them.

A word is a run of `\\w`, in lower case, numbers as they stand; where a script has no spaces (Chinese, Japanese), every
character is one. A run's hash is made of its words' xxh3-64 hashes, in wrapping 64-bit arithmetic, so that a text of m
words costs m look-ups and a few operations on arrays.
"""

import re
import unicodedata

import numpy as np
import xxhash

SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
# Of ASCII, what `\w` is not becomes a space, and letters small: the same words as WORD finds, several times as fast.
FOLD = bytes(ord(chr(c).lower()) if c < 128 and re.match(r"\w", chr(c)) else 32 for c in range(256))
ASCII = bytes(range(128))
LETTERS = re.compile(r"[\w\u0300-\u036f]")  # or what makes another letter of the ASCII one before it
REMEMBERED = 2**18  # distinct words, of which a process keeps the hashes
BASE = np.uint64(0x9E3779B97F4A7C15)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


def words(text: str) -> list[bytes]:
    """In the order of the text, as UTF-8."""
    encoded = text.encode()
    if not text.isascii() and LETTERS.search(encoded.translate(None, ASCII).decode()):
        return [word.encode() for word in WORD.findall(unicodedata.normalize("NFC", text).lower())]
    return encoded.translate(FOLD).split()


class Hashes(dict[bytes, int]):
    """{word: xxh3-64}, computed when first asked for."""

    def __init__(self, masked: bool = False):
        super().__init__()
        self.masked = masked  # whether a number is as good as another

    def __missing__(self, word: bytes) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        self[word] = value = xxhash.xxh3_64_intdigest(re.sub(rb"\d+", b"0", word) if self.masked else word)
        return value

    def of(self, found: list[bytes]) -> np.ndarray:
        """(words,) uint64."""
        return np.fromiter(map(self.__getitem__, found), np.uint64, len(found))


def mixed(hashes: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers after which each bit depends on all (splitmix64's last step)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * MIX[0]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * MIX[1]
    return hashes ^ (hashes >> np.uint64(31))


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """(max(0, words - n + 1),) uint64: the hash of each run of n words, in order; n is a part of it."""
    count = len(hashes) - n + 1
    if count <= 0:
        return hashes[:0]
    total = hashes[:count].copy()
    for offset in range(1, n):
        total = total * BASE + hashes[offset : offset + count]
    return mixed(total + np.uint64(n))


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """The set of a text's runs of n words, sorted, uint64; of a shorter text, the run of all its words."""
    found = np.sort(runs(hashes, min(n, len(hashes))))
    new = np.ones(len(found), bool)
    new[1:] = found[1:] != found[:-1]
    return found[new]
