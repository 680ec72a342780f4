"""Loops in generated text: a model that says the same again and again.

datatrove's Gopher repetition rule with thresholds for answers: a proof or a program repeats more of itself than a
page of the web does, a loop nearly all. Words are split by a regular expression. A loop within one word, or in a
script without spaces, shows in how small zlib makes the text: prose comes to .4, programs and tables to .2, loops
below .05."""

import re
import zlib
from typing import Any

WORD = re.compile(r"\w+|[^\w\s]")
LEAST_WORDS = 60
LEAST_CHARACTERS = 400
LEAST_SIZE = 0.06  # of the text, compressed
TOP_NGRAMS: Any = ((2, 0.4), (3, 0.4), (4, 0.4))  # (n, greatest share of characters in the commonest one)
REPEATED_NGRAMS: Any = ((10, 0.5),)  # (n, greatest share of characters in repeated ones)


class Loops:
    """Why an assistant's text is a loop, or None."""

    def __init__(self):
        from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
        from datatrove.utils.word_tokenizers import WordTokenizer

        class Words(WordTokenizer):
            def word_tokenize(self, text: str) -> list[str]:
                return WORD.findall(text)

            def sent_tokenize(self, text: str) -> list[str]:
                raise NotImplementedError

            def span_tokenize(self, text: str) -> list[tuple[int, int]]:
                raise NotImplementedError

        words: Any = Words("any")
        self.rule = GopherRepetitionFilter(
            dup_line_frac=0.7,
            dup_line_char_frac=0.6,
            dup_para_frac=0.6,
            dup_para_char_frac=0.5,
            top_n_grams=TOP_NGRAMS,
            dup_n_grams=REPEATED_NGRAMS,
            language=words,
        )

    def __call__(self, text: str) -> str | None:
        from rlt.preparation.quality_text import BLANK_LINE, verdict

        if len(text) < LEAST_CHARACTERS:
            return None
        packed = text.encode("utf-8", "replace")
        if len(zlib.compress(packed, 1)) < LEAST_SIZE * len(packed):
            return "loop"
        if len(WORD.findall(text)) < LEAST_WORDS:
            return None
        kept, reason = verdict(self.rule, BLANK_LINE.sub("", text))
        return None if kept else reason
