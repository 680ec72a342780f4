"""What formats read a row with: columns that must be there, texts with a thought in them, parsed calls of tools."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlt.formats.record import Record, message

Row = dict[str, Any]
THOUGHT_KEYS = ("thinking", "reasoning_content", "reasoning")
OPEN, CLOSE = "<think>", "</think>"


class Unfit(Exception):
    """A row that its format cannot take, with the reason for the ledger."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Options:
    """The settings that formats depend on; schema.ReadConfig says what they mean."""

    keep_calculations: bool = False
    answers_per_tree: int | None = None


class Columns:
    """A row, and which of its columns its format has used.

    Where a method takes several names, the first that the row has is meant: a public format's other spellings.

    Raises:
        Unfit: `bad_column:<name>` where it is missing or holds another type, `empty_column:<name>` where it is blank.
    """

    def __init__(self, row: Row):
        self.row = row
        self.used: set[str] = set()

    def value(self, *names: str) -> Any:
        """None where it is missing."""
        for name in names:
            if name in self.row:
                self.used.add(name)
                return self.row[name]
        return None

    def text(self, *names: str) -> str:
        found = self.value(*names)
        if not isinstance(found, str):
            raise Unfit(f"bad_column:{names[0]}")
        if not found.strip():
            raise Unfit(f"empty_column:{names[0]}")
        return found

    def optional(self, *names: str) -> str | None:
        """None where it is missing, null or blank."""
        found = self.value(*names)
        if found is not None and not isinstance(found, str):
            raise Unfit(f"bad_column:{names[0]}")
        return found if found and found.strip() else None

    def answer(self, *names: str) -> str | None:
        """A short gold answer, which tables also hold as a number."""
        found = self.value(*names)
        if isinstance(found, int | float) and not isinstance(found, bool):
            return str(found)
        if found is not None and not isinstance(found, str):
            raise Unfit(f"bad_column:{names[0]}")
        return found.strip() if found and found.strip() else None

    def items(self, *names: str, of: type | None = None) -> list[Any]:
        """A list that is not empty."""
        found = self.value(*names)
        if not isinstance(found, list) or (of is not None and not all(isinstance(item, of) for item in found)):
            raise Unfit(f"bad_column:{names[0]}")
        if not found:
            raise Unfit(f"empty_column:{names[0]}")
        return found

    def rest(self) -> Row:
        """What no one has used and is not null."""
        return {name: value for name, value in self.row.items() if name not in self.used and value is not None}


def dialogue(question: str, answer: str, *, system: str | None = None, thinking: str | None = None) -> list[dict]:
    """One question and its answer, behind a system prompt where there is one; an answer may begin with its thought.

    Raises:
        Unfit: as `split_thought`, or there is a thought and no answer.
    """
    if thinking is None:
        thinking, answer = split_thought(answer)
        if not answer:
            raise Unfit("empty_assistant")
    first = [message("system", system)] if system else []
    return [*first, message("user", question), message("assistant", answer, thinking=thinking)]


def split_thought(text: str) -> tuple[str | None, str]:
    """The thought and the answer of an assistant's text that begins with `<think>`; elsewhere the tag is text.

    Raises:
        Unfit: the thought has no end, no beginning, or another one inside.
    """
    if not text.lstrip().startswith(OPEN):
        if CLOSE in text and OPEN not in text:
            raise Unfit("thought without its beginning")
        return None, text
    thought, end, answer = text.lstrip().removeprefix(OPEN).partition(CLOSE)
    if not end:
        raise Unfit("thought without its end")
    if OPEN in thought or CLOSE in answer:
        raise Unfit("thought inside of a thought")
    return thought.strip() or None, answer.strip()


def parsed(text: str, reason: str) -> Any:
    """A value that stands as JSON, or as Python writes one (single quotes).

    Raises:
        Unfit: it is neither.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text.strip())
        json.dumps(value)  # no sets, bytes or complex numbers
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Unfit(reason) from None
    return value


def tool_call(name: Any, arguments: Any, number: str | int) -> dict[str, Any]:
    """A call; arguments are an object, or text that holds one.

    Raises:
        Unfit: they cannot be parsed, or there is no name.
    """
    if isinstance(arguments, str):
        arguments = parsed(arguments, "unparsable tool call") if arguments.strip() else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict | None):
        raise Unfit("unparsable tool call")
    return {"id": number if isinstance(number, str) else f"call_{number}", "name": name, "arguments": arguments or {}}


def tool_list(given: Any) -> list[dict[str, Any]]:
    """Declared functions in OpenAI's wrapping, which chat templates take: given so, bare, or as JSON text of either.

    Raises:
        Unfit: they cannot be parsed, or one has no name.
    """
    if isinstance(given, str):
        given = parsed(given, "unparsable tools") if given.strip() else []
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list | None):
        raise Unfit("unparsable tools")
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in given or ()]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
        raise Unfit("unparsable tools")
    return [{"type": "function", "function": _as_schema(tool)} for tool in tools]


def _as_schema(value: Any) -> Any:
    """Berkeley's function lists say `dict` where JSON Schema says `object`."""
    if isinstance(value, dict):
        return {k: "object" if k == "type" and v == "dict" else _as_schema(v) for k, v in value.items()}
    return [_as_schema(item) for item in value] if isinstance(value, list) else value


def decoded_objects(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before the first `{`, and the JSON objects that follow one another without commas.

    Raises:
        Unfit: what follows is not JSON.
    """
    before, brace, rest = text.partition("{")
    objects, decoder, rest = [], json.JSONDecoder(), brace + rest
    while rest := rest.lstrip(" \t\r\n,"):
        try:
            value, end = decoder.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError):
            raise Unfit("unparsable tools") from None
        objects.append(value)
        rest = rest[end:]
    return before, objects


def match_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each tool's result behind the call that it answers, by id where it has one, else in order.

    Raises:
        Unfit: a result without a call, or a call without a result that the conversation goes on after.
    """
    waiting: list[dict[str, Any]] = []
    matched = []
    for turn in messages:
        if turn["role"] == "tool":
            turn = _matched(turn, waiting)
            waiting = [call for call in waiting if call["id"] != turn["tool_call_id"]]
        elif waiting:
            raise Unfit("tool call without a result")
        else:
            waiting = list(turn["tool_calls"] or ())
        matched.append(turn)
    return matched


def _matched(turn: dict[str, Any], waiting: list[dict[str, Any]]) -> dict[str, Any]:
    asked = turn["tool_call_id"]
    call = next((call for call in waiting if asked is None or call["id"] == asked), None)
    if call is None:
        raise Unfit("tool result without a call")
    return {**turn, "tool_call_id": call["id"], "name": turn["name"] or call["name"]}


def after_last(text: str, marker: str) -> str:
    """What stands behind the last marker.

    Raises:
        Unfit: there is no marker, or nothing behind it.
    """
    _, found, answer = text.rpartition(marker)
    if not found or not answer.strip():
        raise Unfit("no final answer")
    return answer.strip()


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None where there is none."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:place].strip() or None
    return None


def without_commas(number: str) -> str:
    """1,234 as 1234; commas that do not stand before three digits stay."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number)


One = Callable[[Columns, Options], Record]
