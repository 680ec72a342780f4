"""Personal data and secrets are replaced, by tags (`<EMAIL_1>`) or by made-up values; the same value by the same in a
record.

In mathematics and code (domain.py) only what no number can be is looked for: addresses of e-mail, credentials and
secrets. A telephone number needs a + or a word about telephones before it, which may stand in the turn before, or as
the key in a tool call's arguments; once it is known, it is replaced wherever it stands in the record.

No value is ever logged or counted by content: notes have how many of each entity. Not seen: a value whose halves
stand in two turns, names and places without a model (`pii_names`), and numbers in arguments that are no strings."""

import importlib.util
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, map_texts, texts_of, turns_of
from rlt.preparation.domain import PROSE, domain_of
from rlt.preparation.pii_patterns import (
    ANYWHERE,
    CONTEXT,
    ENTITIES,
    IP4,
    IP6,
    NAMES,
    PHONE,
    Span,
    flattened,
    recognisers,
)
from rlt.preparation.pii_replace import STYLES, Replacements, Surrogates, replaced
from rlt.preparation.stage import RowStage, Task

ROUNDS = 10  # of looking again: a replacement can bring a number nearer to a word about telephones


class Pii(RowStage):
    """Replaces values; drops nothing."""

    name = "pii"
    keys = ("pii_entities", "pii_style", "pii_names", "seed")

    def check(self) -> None:
        for entity in self.settings.pii_entities:
            if entity not in ENTITIES:
                raise Refused(f"pii_entities: {entity!r} does not exist: use some of {', '.join(sorted(ENTITIES))}")
        if self.settings.pii_style not in STYLES:
            raise Refused(f"pii_style={self.settings.pii_style}: use one of {', '.join(STYLES)}")
        for key, needed, package in (("pii_entities", self.settings.pii_entities, "presidio_analyzer"),
                                     ("pii_style", self.settings.pii_style == "surrogate", "faker")):  # fmt: skip
            if needed and importlib.util.find_spec(package) is None:
                group = "test" if package == "faker" else "data"
                raise Refused(
                    f"{key}={getattr(self.settings, key)} needs the package {package}: ./setup.sh data {group}"
                )
        if self.settings.pii_names is not None and not is_model(self.settings.pii_names):
            named = self.settings.pii_names
            raise Refused(f"pii_names={named} is neither the folder of a spaCy model nor an installed package")

    def files(self) -> list[Path]:
        model = Path(self.settings.pii_names or "")
        return sorted(path for path in model.rglob("*") if path.is_file()) if (model / "meta.json").is_file() else []

    def start(self, task: Task) -> None:
        self.finder = Finder(tuple(self.settings.pii_entities), self.settings.pii_names)
        self.surrogates = Surrogates(self.settings.seed) if self.settings.pii_style == "surrogate" else None
        self.counts: Counter[str] = Counter()

    def one(self, record: Record) -> Record | Dropped:
        return without_pii(record, self.finder, Replacements(self.surrogates), self.counts)

    def notes(self) -> dict[str, int]:
        return dict(self.counts)


def is_model(named: str) -> bool:
    """Whether spaCy can load it: a folder that it saved, or an installed package."""
    if (Path(named) / "meta.json").is_file():
        return True
    return named.isidentifier() and importlib.util.find_spec(named) is not None


class Finder:
    """Spans of all entities in a text, without overlaps.

    Args:
        entities: of `ENTITIES`.
        names: a spaCy model, by package or folder.
    """

    def __init__(self, entities: tuple[str, ...], names: str | None = None):
        self.finders = recognisers(entities)
        self.model = None
        if names is not None:
            import spacy

            self.model = spacy.load(names)

    def __call__(self, text: str, before: str = "", prose: bool = True) -> list[Span]:
        """
        Args:
            text: flattened.
            before: what stands before it, in which a word can say what a number is.
            prose: False looks for what no number can be.
        """
        found = []
        for entity, find in self.finders.items():
            if prose or entity in ANYWHERE:
                found += [Span(start, end, entity) for start, end in find(text, before)]
        if prose and self.model is not None and text.strip():
            ends = self.model(text).ents
            found += [Span(e.start_char, e.end_char, NAMES[e.label_]) for e in ends if e.label_ in NAMES]
        return apart(found)


def apart(found: list[Span]) -> list[Span]:
    """Of spans that overlap the one whose entity was looked for first; in order of place."""
    kept: list[Span] = []
    for span in found:
        place = bisect(kept, span)
        free = place == 0 or kept[place - 1].end <= span.start
        if free and (place == len(kept) or span.end <= kept[place].start):
            kept.insert(place, span)
    return kept


def without_pii(record: Record, finder: Finder, replace: Replacements, counts: Counter[str]) -> Record:
    """The record with its values replaced, and `counts` raised by how many there were of each entity."""
    prose = domain_of(record) == PROSE
    known = known_values(record, finder, prose)
    if not known:
        return record
    before = ""

    def change(text: str) -> str:
        nonlocal before
        for _ in range(ROUNDS):
            flat = flattened(text)
            spans = apart([*finder(flat, before, prose), *known_again(flat, known)])
            if not spans:
                break
            counts.update(span.entity for span in spans)
            text = replaced(text, spans, replace, flat)
            if replace.surrogates:
                break
        before = flattened(text)[-CONTEXT:]
        return text

    changed = map_texts(record, change)
    counts["records_changed"] += 1
    return changed


def known_values(record: Record, finder: Finder, prose: bool) -> dict[str, str]:
    """{value: entity} of all texts, and of arguments as JSON, in which keys say what values are."""
    known: dict[str, str] = {}
    before = ""
    for text in (*texts_of(record), *_arguments(record)):
        flat = flattened(text)
        for span in finder(flat, before, prose):
            known.setdefault(flat[span.start : span.end], span.entity)
        before = flat[-CONTEXT:]
    return known


def known_again(text: str, known: dict[str, str]) -> Iterator[Span]:
    """Numbers that something else in the record has told to be a telephone's, or an address."""
    for entity, candidate in (("phone", PHONE), ("ip", IP4), ("ip", IP6)):
        if entity in known.values():
            yield from (Span(*m.span(), entity) for m in candidate.finditer(text) if known.get(m[0]) == entity)


def _arguments(record: Record) -> Iterator[str]:
    for turn in turns_of(record):
        for call in turn["tool_calls"] or ():
            yield orjson.dumps(call["arguments"]).decode()
