"""How alike two texts are."""

import re

SHINGLE = 5  # words


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of two texts' runs of five words (Broder 1997); texts of fewer words are one run each."""
    x, y = _shingles(a), _shingles(b)
    return len(x & y) / len(x | y) if x | y else 1.0


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    size = min(SHINGLE, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if size else set()
