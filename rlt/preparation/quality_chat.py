"""Rules for conversations, preferences and questions with a gold answer; each gives a reason to drop, or None.

turns        begins with system or user, alternates, ends with the assistant (kind rl may end with the user), none is
empty answer       a gold answer that a record has is not blank; kind rl has one, or tests; math-verify or a choice
reads it, and
             the question does not give it away
repetition   no loop in what an assistant says or thinks
truncated    no open fence or thought, no answer of the teacher's greatest length that ends in mid-sentence
tool_calls   a call's arguments are an object, its name is declared, each result has its call and each call its result
language     question and answer are in one language, unless another one is asked for
refusals     (not in the default) no "As an AI language model" nor "I'm sorry, but I can't"
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import orjson

from rlt.formats.record import Record, prompt_of
from rlt.preparation.language import Detector, prose_of
from rlt.preparation.quality_loops import Loops
from rlt.schema import PrepareSettings

Turns = list[dict[str, Any]]

FOLLOWS = {  # role: those that may come next
    "system": ("system", "developer", "user"),
    "developer": ("developer", "user"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?…:。！？।؟\"'”’»)\]}*_`$|>~]\s*\Z|\\(?:end\{\w+\*?\}|\])\s*\Z")
RETOKENISED = 0.98  # of the greatest length: text that is encoded again may have a few tokens fewer
REFUSAL = re.compile(
    r"\b(?:as an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant)?\b"
    r"|i(?:'|’)?m (?:sorry|afraid|unable)\b.{0,40}\b(?:can(?:no|'|’)t|unable|not able)"
    r"|i (?:can(?:no|'|’)t|am unable to|am not able to) (?:assist|help|fulfil|comply|provide|answer)\b)",
    re.IGNORECASE,
)
REFUSES_WITHIN = 300  # characters from the start: an apology there is the answer, later ones are about something
LEAKS_FROM = 20  # characters: an answer so long stands in the question only if it was put there
MARKED = r"(?:####|\\boxed\s*\{{|\b(?:answer|solution)(?: is)?\s*[:=]?)\s*\$?{}(?![\w.]*\w)"
OTHER_LANGUAGE = re.compile(
    r"translat|in other languages|\b(?:english|french|german|spanish|italian|portuguese|dutch|russian|chinese|mandarin"
    r"|japanese|korean|arabic|hindi|turkish|polish|swedish|greek|hebrew|latin|vietnamese|thai|ukrainian|czech|finnish|danish"
    r"|norwegian|indonesian|persian|urdu|bengali|language)\b",
    re.IGNORECASE,
)
SURE = 0.8  # of a language, on both sides


class ChatRules:
    """The rules of `chat_rules`, in their order; `counts` has what is kept though a rule could not look."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.loops, self.detector = Loops(), Detector()
        self.tokenizer, self.longest = None, settings.max_answer_tokens
        if self.longest is not None:
            from rlt.models.loading import load_tokenizer
            from rlt.models.paths import resolve_model_path

            assert settings.tokenizer is not None
            self.tokenizer = load_tokenizer(resolve_model_path(settings.tokenizer))

    def __call__(self, record: Record) -> str | None:
        for rule in self.settings.chat_rules:
            if reason := getattr(self, rule)(record):
                return f"{rule}: {reason}"
        return None

    def turns(self, record: Record) -> str | None:
        return next(filter(None, (_order(turns, record["kind"]) for turns in conversations(record))), None)

    def answer(self, record: Record) -> str | None:
        gold = record["answer"]
        if gold is not None and not gold.strip():
            return "blank"
        if record["kind"] != "rl":
            return None
        if gold is None:
            return None if record["tests"] else "missing"
        if not record["tests"] and not can_be_checked(gold):
            return "cannot be checked"
        return "in the question" if gives_away(prompt_of(record), gold.strip()) else None

    def repetition(self, record: Record) -> str | None:
        return next(filter(None, map(self.loops, spoken(record))), None)

    def truncated(self, record: Record) -> str | None:
        for turns in conversations(record):
            for turn in turns:
                if turn["role"] == "assistant" and (reason := self._cut(turn)):
                    return reason
        return None

    def _cut(self, turn: dict[str, Any]) -> str | None:
        content = turn["content"] or ""
        if _open_fence(content):
            return "open fence"
        if content.count("<think>") > content.count("</think>"):
            return "open thought"
        if self.tokenizer is None or self.longest is None or SENTENCE_END.search(content):
            return None
        text = f"{turn['thinking'] or ''}{content}"
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return "greatest length" if tokens >= RETOKENISED * self.longest else None

    def tool_calls(self, record: Record) -> str | None:
        declared = {name for tool in record["tools"] or () if (name := tool_name(tool))}
        if not declared and any(turn["tool_calls"] for turns in conversations(record) for turn in turns):
            self.counts["calls_without_declared_tools"] += 1  # formats that declare them in the system's text
        found = (_calls(turns, declared) for turns in conversations(record))
        return next(filter(None, found), None)

    def language(self, record: Record) -> str | None:
        asked = prompt_of(record)
        prose = prose_of(asked), prose_of("\n".join(turn["content"] or "" for turn in _assistant(record)))
        if None in prose or OTHER_LANGUAGE.search(asked):
            return None
        (one, sure), (other, as_sure) = (self.detector(text) for text in prose if text)
        return "another one in the answer" if one != other and min(sure, as_sure) >= SURE else None

    def refusals(self, record: Record) -> str | None:
        found = any(REFUSAL.search((turn["content"] or "")[:REFUSES_WITHIN]) for turn in _assistant(record))
        return "refused" if found else None


CHAT_RULES = ("turns", "answer", "repetition", "truncated", "tool_calls", "language", "refusals")


def conversations(record: Record) -> list[Turns]:
    """The one conversation, or that with the chosen answer and that with the rejected one."""
    asked = record["messages"] or []
    if record["kind"] == "preference":
        return [[*asked, *(record[key] or [])] for key in ("chosen", "rejected")]
    return [asked]


def _assistant(record: Record) -> Iterator[dict[str, Any]]:
    return (turn for turns in conversations(record) for turn in turns if turn["role"] == "assistant")


def spoken(record: Record) -> Iterator[str]:
    """What assistants think and say, turn by turn."""
    for turn in _assistant(record):
        yield from filter(None, (turn["thinking"], turn["content"]))


def _order(turns: Turns, kind: str) -> str | None:
    if not turns:
        return "none"
    if turns[0]["role"] not in ("system", "developer", "user"):
        return f"{turns[0]['role']} first"
    for turn, following in pairwise(turns):
        if following["role"] not in FOLLOWS[turn["role"]]:
            return f"{following['role']} after {turn['role']}"
    if turns[-1]["role"] not in (("user", "assistant") if kind == "rl" else ("assistant",)):
        return "last is not assistant"
    blank = {t["role"] for t in turns if not (t["content"] or "").strip() and not t["tool_calls"]} - {"tool", "system"}
    return f"empty {min(blank)}" if blank else None


def _open_fence(text: str) -> bool:
    """A fence is closed by one of its own kind, at least as long."""
    opened = None
    for mark in FENCE.findall(text):
        if opened is None:
            opened = mark
        elif mark[0] == opened[0] and len(mark) >= len(opened):
            opened = None
    return opened is not None


def tool_name(tool: dict[str, Any]) -> str | None:
    """Of a tool as OpenAI's format has it, or of the function alone."""
    return (tool.get("function") or tool).get("name")


def _calls(turns: Turns, declared: set[str]) -> str | None:
    waiting: list[str | None] = []  # ids of calls without a result
    for turn in turns:
        if turn["role"] == "tool":
            if (name := turn["tool_call_id"]) is not None and name in waiting:
                waiting.remove(name)
            elif waiting and (name is None or waiting[0] is None):
                waiting.pop(0)
            else:
                return "result without call"
        elif waiting:
            return "call without result"
        for call in turn["tool_calls"] or ():
            if (reason := _call(call, declared)) is not None:
                return reason
            waiting.append(call.get("id"))
    return None


def _call(call: dict[str, Any], declared: set[str]) -> str | None:
    if not call.get("name"):
        return "no name"
    if declared and call["name"] not in declared:
        return "undeclared tool"
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return "arguments are no JSON"
    return None if isinstance(arguments, dict) else "arguments are no object"


def can_be_checked(gold: str) -> bool:
    """A choice or some words, which are compared as they are, or mathematics that the check reads as a whole."""
    from rlt.rewards.formulas import is_readable
    from rlt.rewards.verifiers import WORDS, chosen

    return bool(WORDS.fullmatch(gold) or chosen(gold)) or is_readable(gold)


def gives_away(question: str, gold: str) -> bool:
    """A long answer stands in the question word for word, or a short one behind `answer is`, `####` or in a box."""
    if len(gold) >= LEAKS_FROM:
        return gold.casefold() in question.casefold()
    return re.search(MARKED.format(re.escape(gold)), question, re.IGNORECASE) is not None
