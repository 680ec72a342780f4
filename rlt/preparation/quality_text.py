"""datatrove's rules for web text, behind one adapter: each gives a reason to drop, or None.

A filter of datatrove gives True, or `(False, reason)`, which is true as a condition, and `C4QualityFilter` writes a
shortened text into the document it was asked about. Here a verdict is a verdict, and the text stays whole."""

import re
from collections.abc import Callable, Sequence
from typing import Any

TEXT_RULES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")
BLANK_LINE = re.compile(r"^[ \t]+$", re.MULTILINE)  # which repetition rules would take for repeated lines


class TextRules:
    """The rules that are asked for, in their order.

    Args:
        names: of `TEXT_RULES`.
    """

    def __init__(self, names: Sequence[str]):
        self.filters = {name: made() for name, made in filters().items() if name in names or name == "c4_formulas"}
        self.names = list(names)

    def __call__(self, text: str, with_formulas: bool = False) -> str | None:
        """Why a text is dropped: `gopher_quality: gopher_short_doc`; None: it is kept.

        Args:
            with_formulas: braces of LaTeX are no sign of a program's remains.
        """
        if not text.strip():
            return "empty"
        text = BLANK_LINE.sub("", text)
        for name in self.names:
            kept, reason = verdict(self.filters["c4_formulas" if name == "c4" and with_formulas else name], text)
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


def verdict(rule: Any, text: str) -> tuple[bool, str | None]:
    """(keep, reason) of a datatrove filter, whichever of its two forms it answers in."""
    from datatrove.data import Document

    answer = rule.filter(Document(text=text, id=""))
    kept, reason = answer if isinstance(answer, tuple) else (answer, None)
    return bool(kept), None if kept else str(reason or rule.name)
