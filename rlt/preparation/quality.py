"""Rules of quality, by kind: those of the web for text (quality_text.py), those of conversations for the rest
(quality_chat.py).

Rules of the web are wrong for an answer: twelve right words are "a short document". A rule keeps a record or names
why not; no rule changes one."""

from collections import Counter
from pathlib import Path

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record
from rlt.preparation.domain import CODE, MATHS, domain_of
from rlt.preparation.quality_chat import CHAT_RULES, ChatRules
from rlt.preparation.quality_text import TEXT_RULES, TextRules
from rlt.preparation.stage import RowStage, Task
from rlt.preparation.tokenizers import tokenizer_files


class Quality(RowStage):
    """Drops what a rule of its kind rejects."""

    name = "quality"
    keys = ("text_rules", "chat_rules", "max_answer_tokens", "tokenizer")

    def depends_on(self) -> tuple[str, ...]:
        return self.keys if self.settings.max_answer_tokens is not None else tuple(set(self.keys) - {"tokenizer"})

    def files(self) -> list[Path]:
        named = self.settings.tokenizer
        return tokenizer_files(named) if named and self.settings.max_answer_tokens is not None else []

    def check(self) -> None:
        for key, known in (("text_rules", TEXT_RULES), ("chat_rules", CHAT_RULES)):
            for rule in getattr(self.settings, key):
                if rule not in known:
                    raise Refused(f"{key}: {rule!r} does not exist: use some of {', '.join(known)}")
        if self.settings.max_answer_tokens is not None and self.settings.tokenizer is None:
            raise Refused(
                f"max_answer_tokens={self.settings.max_answer_tokens} counts tokens of the teacher: name its tokenizer "
                "in tokenizer, or set max_answer_tokens=null"
            )

    def start(self, task: Task) -> None:
        self.text_rules = TextRules(self.settings.text_rules)
        self.chat_rules = ChatRules(self.settings)
        self.counts: Counter[str] = self.chat_rules.counts

    def one(self, record: Record) -> Record | Dropped:
        reason = self.reason_of_text(record) if record["kind"] == "text" else self.chat_rules(record)
        return record if reason is None else Dropped(reason)

    def reason_of_text(self, record: Record) -> str | None:
        """Code, and text that is known to be in another language than English, is not judged: the rules are English."""
        text = record["text"] or ""
        if not text.strip():
            return "empty"
        domain = domain_of(record)
        if domain == CODE or record["meta"].get("lang") not in (None, "en"):
            self.counts["code_not_judged" if domain == CODE else "language_not_judged"] += 1
            return None
        return self.text_rules(text, with_formulas=domain == MATHS)

    def notes(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if count}
