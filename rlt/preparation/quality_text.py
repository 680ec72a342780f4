"""datatrove's rules for web text, behind one adapter: each gives a reason to drop, or None.

A filter of datatrove gives True, or `(False, reason)`, which is true as a condition, and `C4QualityFilter` writes a
shortened text into the document it was asked about. Here a verdict is a verdict, and the text stays whole."""

import re
from collections.abc import Callable, Sequence
from typing import Any

TEXT_RULES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")
LONG_WORD = re.compile(r"(?<!\S)\S{5000}")  # a blob, on which the tokenizer would take a square of time
BLANK_LINE = re.compile(r"^[ \t]+$", re.MULTILINE)  # which repetition rules would take for repeated lines


class TextRules:
    """The rules that are asked for, in their order.

    Args:
        names: of `TEXT_RULES`.
    """

    def __init__(self, names: Sequence[str]):
        self.filters = {name: made() for name, made in filters().items() if name in names or name == "c4_formulas"}
        self.names = list(names)
        self.sentences = sentences_until_enough()

    def __call__(self, text: str, with_formulas: bool = False) -> str | None:
        """Why a text is dropped: `gopher_quality: gopher_short_doc`; None: it is kept.

        Args:
            with_formulas: braces of LaTeX are no sign of a program's remains.
        """
        if not text.strip():
            return "empty"
        if LONG_WORD.search(text):
            return "word_too_long"
        text = BLANK_LINE.sub("", text)
        for name in self.names:
            rule = self.filters["c4_formulas" if name == "c4" and with_formulas else name]
            if name == "c4":
                rule.language = self.sentences(rule.min_num_sentences)
            kept, reason = verdict(rule, text)
            if not kept:
                return f"{name}: {reason}"
        return None


def filters() -> dict[str, Callable[[], Any]]:
    """How each rule's filter is made; its English words come from spaCy's tokenizer, which needs no model."""
    from datatrove.pipeline.filters.c4_filters import C4QualityFilter
    from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    return {
        "gopher_quality": GopherQualityFilter,
        "gopher_repetition": GopherRepetitionFilter,
        "fineweb": FineWebQualityFilter,
        "c4": C4QualityFilter,
        "c4_formulas": lambda: C4QualityFilter(filter_curly_bracket=False),
    }


def sentences_until_enough() -> Callable[[int], Any]:
    """datatrove's sentences of English for one text, at first; once there are enough for a rule, each line is one.

    The rule only asks whether there are fewer, and to split every line would take as long as all other rules together.
    """
    from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

    english = load_word_tokenizer("en")

    class Sentences(WordTokenizer):
        def __init__(self, enough: int):
            super().__init__("en")
            self.left = enough

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            spans = english.span_tokenize(text) if self.left > 0 else [(0, len(text))]
            self.left -= len(spans)
            return spans

        def sent_tokenize(self, text: str) -> list[str]:
            return english.sent_tokenize(text)

        def word_tokenize(self, text: str) -> list[str]:
            return english.word_tokenize(text)

    return Sentences


def verdict(rule: Any, text: str) -> tuple[bool, str | None]:
    """(keep, reason) of a datatrove filter, whichever of its two forms it answers in."""
    from datatrove.data import Document

    answer = rule.filter(Document(text=text, id=""))
    kept, reason = answer if isinstance(answer, tuple) else (answer, None)
    return bool(kept), None if kept else str(reason or rule.name)
