"""Chapters of the Bible in four English versions, and copies with words changed; licences: of installed packages.

The same chapter in two versions is a near duplicate of any degree, from hardly to exactly, whose Jaccard similarity is
counted, not estimated.
"""

import random
import re
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

VERSIONS = ("kjv", "akjv", "asv", "web")
CHANGED = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06)  # share of words, of copies


def chapters(version: str) -> list[str]:
    """Those of at least 100 words, in order."""
    bible = import_module(f"pythonbible_{version}.plain_text_readers_bible").bible
    starts, ends, text = bible.verse_start_indices, bible.verse_end_indices, bible.scripture_content
    found: dict[int, list[str]] = {}
    for verse, start in starts.items():
        found.setdefault(verse // 1000, []).append(text[start : ends[verse]].strip())
    joined = (" ".join(verses) for verses in found.values())
    return [chapter for chapter in joined if len(chapter.split()) >= 100]


def edited(text: str, share: float, generator: random.Random) -> str:
    """With so many of its words replaced by others of its own."""
    words = text.split(" ")
    for place in generator.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = generator.choice(words)
    return " ".join(words)


def corpus(books: int | None = None, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Chapters of all versions, shuffled, and one copy with words changed of each of the first version's."""
    generator = random.Random(0)
    found = [chapters(version)[:books] for version in versions]
    copies = [edited(text, generator.choice(CHANGED), generator) for text in found[0]]
    texts = [text for some in (*found, copies) for text in some]
    generator.shuffle(texts)
    return texts


def licences() -> list[str]:
    """Licences of the packages that are installed, by name."""
    texts = []
    for one in sorted(distributions(), key=lambda found: str(found.metadata["Name"])):
        for file in one.files or ():
            if re.search(r"LICENSE|COPYING", file.name) and (path := Path(str(file.locate()))).is_file():
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def five_word_runs(text: str) -> set[tuple[str, ...]]:
    """What two texts are compared by, in the plainest Python."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))} if words else set()


def similar_pairs(texts: list[str], at_least: float) -> dict[tuple[int, int], float]:
    """Every pair of texts that is so similar, by counting what every two that share a run have in common."""
    sets = [five_word_runs(text) for text in texts]
    having: dict[tuple[str, ...], list[int]] = {}
    for number, one in enumerate(sets):
        for run in one:
            having.setdefault(run, []).append(number)
    common: dict[tuple[int, int], int] = {}
    for numbers in having.values():
        for place, a in enumerate(numbers):
            for b in numbers[place + 1 :]:
                common[a, b] = common.get((a, b), 0) + 1
    values = {(a, b): both / (len(sets[a]) + len(sets[b]) - both) for (a, b), both in common.items()}
    return {pair: value for pair, value in values.items() if value >= at_least}


def best_kept(texts: list[str], pairs: dict[tuple[int, int], float]) -> set[int]:
    """The rule in plain Python: longest first, then earliest; what is like a kept one is not kept."""
    like: dict[int, set[int]] = {}
    for a, b in pairs:
        like.setdefault(a, set()).add(b)
        like.setdefault(b, set()).add(a)
    kept: set[int] = set()
    for number in sorted(range(len(texts)), key=lambda n: (-len(texts[n]), n)):
        if not like.get(number, set()) & kept:
            kept.add(number)
    return kept


def as_records(texts: list[str]) -> list[dict]:
    from stage_alone import text_record

    return [text_record(number, text, "bible") for number, text in enumerate(texts)]
