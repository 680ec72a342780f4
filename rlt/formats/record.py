"""The one form that every row has between reading and writing, whatever format it came in.

A record is plain JSON, so that any stage, engine or person can read it:

    id          `<source>:<row>:<xxh3-64 of the content>`
    source      the name of the source it came from, and `license`, as the source's entry says
    kind        text | chat | preference | rl
    text        of kind text; else None
    messages    [{role, content, thinking, tool_calls, tool_call_id, name, train}], what is not there is None;
                tool_calls [{id, name, arguments}], arguments an object
    tools       [{type: function, function: {name, description, parameters}}]
    answer      the gold final answer, or None
    chosen, rejected    messages, of kind preference
    tests       code that checks a solution, or None
    meta        {kind, group, lang, split, ...}: what formats and stages add; `kind` is prose, maths or code, `extra`
                has the source's own other columns
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import xxhash

Record = dict[str, Any]

KINDS = ("text", "chat", "preference", "rl")
ROLES = ("system", "developer", "user", "assistant", "tool")
LISTS = ("messages", "chosen", "rejected")  # of messages
PLAIN = ("text", "answer", "tests")


@dataclass(frozen=True)
class Dropped:
    """A row that a stage does not keep.

    Args:
        reason: a few words, the same for all rows that are dropped for it; never a part of the row.
        score: where a threshold decided: how far from it the row is, for the report of the lowest dropped.
    """

    reason: str
    score: float | None = None


def make_record(kind: str, **fields: Any) -> Record:
    """A record with every field; id, source and license are set by the reading stage."""
    assert kind in KINDS, kind
    empty: Record = {
        **dict.fromkeys(("id", "source", "license", "kind", "text")),
        "messages": [],
        "tools": [],
        **dict.fromkeys(("answer", "chosen", "rejected", "tests")),
        "meta": {},
    }
    assert fields.keys() <= empty.keys(), fields.keys() - empty.keys()
    return {**empty, **fields, "kind": kind}


def message(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    """One turn; `train` is whether a student's loss counts it, by default the assistant's own."""
    assert role in ROLES, role
    empty = dict.fromkeys(("thinking", "tool_calls", "tool_call_id", "name"))
    return {"role": role, "content": content, **empty, "train": role == "assistant", **fields}


def content_hash(record: Record) -> str:
    """xxh3-64, in hex, of what the record says: not of where it came from, nor of what stages noted about it."""
    content = {key: record[key] for key in ("kind", *PLAIN, *LISTS, "tools")}
    return xxhash.xxh3_64_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with every text changed: thoughts, strings inside a tool call's arguments, answer and tests too."""
    changed = {key: _mapped(record[key], change) for key in PLAIN}
    for key in LISTS:
        changed[key] = record[key] and [_mapped_message(turn, change) for turn in record[key]]
    return {**record, **changed}


def _mapped_message(turn: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    calls = turn["tool_calls"] and [{**c, "arguments": _mapped(c["arguments"], change)} for c in turn["tool_calls"]]
    texts = {key: _mapped(turn[key], change) for key in ("content", "thinking")}
    return {**turn, **texts, "tool_calls": calls}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return value


def texts_of(record: Record) -> Iterator[str]:
    """Every text of a record, in the order of `map_texts`."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    map_texts(record, note)
    yield from found


def turns_of(record: Record) -> list[dict[str, Any]]:
    """All messages: those of the conversation, then chosen and rejected ones."""
    return [turn for key in LISTS for turn in record[key] or ()]


def prompt_of(record: Record) -> str:
    """The text that is asked: all turns before the last assistant's, without system prompts; of kind text, nothing."""
    turns = record["messages"] or []
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return "\n\n".join(turn["content"] or "" for turn in turns[:last] if turn["role"] not in ("system", "developer"))


def completion_of(record: Record) -> str:
    """The text that is learned: thought and content of the last assistant turn; of kind text, the text."""
    if record["kind"] == "text":
        return record["text"]
    turns = [t for t in record["messages"] or () if t["role"] == "assistant"] or record["chosen"] or []
    return "\n\n".join(filter(None, (turns[-1]["thinking"], turns[-1]["content"]))) if turns else ""
