"""Repair of text: every text of a record gets one normal form, which a second repair leaves as it is.

ftfy repairs mojibake, control and surrogate characters, and gives NFC. What would change a program or a formula is
off: curly quotes and ligatures stay, as do wide characters and `&lt;` (which a lesson about HTML means as it stands).
Indentation, and spaces at the end of a line (a line break in Markdown), stay too. Marks of direction and joiners
stay: Persian and emoji need them. Nothing is cut: a record that is too long is dropped."""

import re
from collections import Counter

from rlt.formats.record import Dropped, Record, map_texts, texts_of
from rlt.preparation.stage import RowStage, Task

LINE_BREAK = re.compile("\r\n|\r")
SURROGATE = re.compile("[\ud800-\udfff]")
TERMINAL_COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff]")
BLANK_LINES = re.compile(r"\n(?:[ \t]*+\n){3,}+")  # more than two
BLANK_LINES_LEFT = "\n\n\n"
ROUNDS = 8  # of ftfy, at most
# What a chat template would read as its own marks. Texts keep them: a tokenizer's manual has them for a reason, and who
# renders a conversation must encode content as ordinary text. How many records have some is counted.
SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z][\w-]*\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")


class Clean(RowStage):
    """Repairs texts; drops records that are empty or too long."""

    name = "clean"
    keys = ("max_characters",)

    def start(self, task: Task) -> None:
        self.cleaner = Cleaner()

    def one(self, record: Record) -> Record | Dropped:
        before = self.cleaner.counts["texts_changed"]
        cleaned = map_texts(record, self.cleaner)
        self.cleaner.counts["records_changed"] += self.cleaner.counts["texts_changed"] > before
        texts = list(texts_of(cleaned))
        if not any(text.strip() for text in texts):
            return Dropped("empty")
        if sum(map(len, texts)) > self.settings.max_characters:
            return Dropped("too_long")
        self.cleaner.counts["records_with_special_tokens"] += any(map(SPECIAL_TOKEN.search, texts))
        return cleaned

    def notes(self) -> dict[str, int]:
        return {name: count for name, count in self.cleaner.counts.items() if count}


class Cleaner:
    """The normal form of a text; `counts` says what was repaired."""

    def __init__(self):
        from ftfy import TextFixerConfig

        self.config = TextFixerConfig(
            unescape_html=False,
            uncurl_quotes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            explain=False,
            normalization="NFC",
        )
        self.counts: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        cleaned = TERMINAL_COLOUR.sub("", LINE_BREAK.sub("\n", text))
        cleaned, controls = CONTROL.subn("", cleaned)
        if not cleaned.isascii():
            cleaned = self.repaired(self.without_surrogates(cleaned))
        cleaned, gaps = BLANK_LINES.subn(BLANK_LINES_LEFT, cleaned)
        self.counts.update(controls_removed=controls, blank_lines_shortened=gaps, texts_changed=cleaned != text)
        return cleaned

    def without_surrogates(self, text: str) -> str:
        """Two halves of a character meet; a lone one, which no UTF-8 file can hold, becomes U+FFFD."""
        met = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        met, lone = SURROGATE.subn("\ufffd", met)
        self.counts["surrogates_replaced"] += lone
        return met

    def repaired(self, text: str) -> str:
        """By ftfy, as often as it finds something, since a repair can uncover another."""
        from ftfy import fix_text

        for _ in range(ROUNDS):
            fixed = CONTROL.sub("", fix_text(text, self.config))
            if fixed == text:
                break
            text = fixed
        return text
