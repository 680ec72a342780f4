"""Conversations as trainers write them, this project's own rows, and plain text."""

import re
from typing import Any

from rlt.data.sources import TAGS
from rlt.formats.columns import (
    THOUGHT_KEYS,
    Columns,
    Options,
    Unfit,
    dialogue,
    match_results,
    parsed,
    split_thought,
    tool_call,
    tool_list,
)
from rlt.formats.record import Record, make_record, message

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
GOLD = ("answer", "expected_answer", "ground_truth")


def messages(row: Columns, options: Options) -> Record:
    """OpenAI's chat rows: role, content, tool_calls. A `<think>` that begins an answer is the thought."""
    return _conversation(row, "messages")


def openr1(row: Columns, options: Options) -> Record:
    """open-r1/OpenR1-Math-220k: `messages` with thoughts, the problem's gold answer beside them."""
    record = _conversation(row, "messages")
    row.used |= {"problem", "solution", "generations"}  # the same texts again, and what was not chosen
    return {**record, "answer": row.answer("answer"), "meta": {"kind": "maths"}}


def sharegpt(row: Columns, options: Options) -> Record:
    """Turns of `from` and `value` under any of the names that roles go by."""
    return _conversation(row, "conversations")


def openthoughts(row: Columns, options: Options) -> Record:
    """OpenThoughts and Bespoke-Stratos: thought and solution inside of tags of their own."""
    record = _conversation(row, "conversations", tags=True)
    system = row.optional("system")
    if system and not any(turn["role"] == "system" for turn in record["messages"]):
        record["messages"].insert(0, message("system", system))
    return record


def prompt_answer(row: Columns, options: Options) -> Record:
    """A question with its gold answer alone (kind rl), or with a solution and the thought before it."""
    given = row.value("prompt", "question", "problem")
    if isinstance(given, list):
        asked = chat_messages(given)
    else:
        system = row.optional("system")
        asked = [message("system", system)] if system else []
        asked.append(message("user", row.text("prompt", "question", "problem")))
    if not row.row.keys() & {"solution", *GOLD}:
        raise Unfit("bad_column:answer")
    answer = row.answer(*GOLD)
    if "solution" in row.row:
        answered = dialogue("", row.text("solution"), thinking=row.optional("reasoning_trace"))[1:]
        return make_record("chat", messages=[*asked, *answered], answer=answer)
    if answer is None:
        raise Unfit("empty_column:answer")
    return make_record("rl", messages=asked, answer=answer)


def text(row: Columns, options: Options) -> Record:
    """Plain text; its source's `kind` says whose rules it is judged by."""
    return make_record("text", text=row.text("text"))


def _conversation(row: Columns, column: str, tags: bool = False) -> Record:
    tools = tool_list(row.value("tools", "functions"))
    return make_record("chat", messages=chat_messages(row.value(column), tags), tools=tools)


def chat_messages(given: Any, tags: bool = False) -> list[dict[str, Any]]:
    """The canonical turns of a list of turns, or of its JSON text, which tables of text hold.

    Raises:
        Unfit: a turn without a known role or text, a thought or call that cannot be parsed, a result without a call.
    """
    if isinstance(given, str):
        given = parsed(given, "bad_column:messages")
    if not isinstance(given, list):
        raise Unfit("bad_column:messages")
    if not given:
        raise Unfit("no messages")
    return match_results([_turn(turn, number, tags) for number, turn in enumerate(given)])


def role_of(turn: Any) -> str:
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise Unfit("unknown_role")
    return ROLES[name.lower()]


def content_of(turn: dict[str, Any]) -> str | None:
    """The text of a turn: as it is, or in parts of the kind `text`; None where it has none."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Unfit("content part that is no text")
        content = "".join(texts)
    if content is not None and not isinstance(content, str):
        raise Unfit("content is no text")
    return content


def _turn(turn: Any, number: int, tags: bool) -> dict[str, Any]:
    role = role_of(turn)
    content = content_of(turn)
    if role != "assistant":
        if content is None or (role == "user" and not content.strip()):
            raise Unfit(f"empty_{role}")
        named = {"tool_call_id": turn.get("tool_call_id"), "name": turn.get("name")} if role == "tool" else {}
        return message(role, content, **named)
    if turn.get("from") == "function_call":
        calls, content, thought = _calls(parsed(content or "", "unparsable tool call"), number), None, None
    else:
        calls = _calls(turn.get("tool_calls"), number)
        thought, content = thought_of(turn, content, tags)
    if not calls and not (content and content.strip()):
        raise Unfit("empty_assistant")
    train = {"train": False} if turn.get("train") is False else {}
    return message(role, content, thinking=thought, tool_calls=calls, **train)


def thought_of(turn: dict[str, Any], content: str | None, tags: bool) -> tuple[str | None, str | None]:
    """The thought, of a key of its own or in the text, and the text without it."""
    for key in THOUGHT_KEYS:
        if isinstance(turn.get(key), str) and turn[key].strip():
            return turn[key], content
    if content is None:
        return None, None
    if not tags:
        return split_thought(content)
    found = [re.search(f"{re.escape(start)}(.*?){re.escape(end)}", content, re.DOTALL) for start, end in TAGS]
    thought, solution = (match and match.group(1).strip() for match in found)
    if not thought or not solution:
        raise Unfit("no thought or solution tags")
    return thought, solution


def _calls(given: Any, number: int) -> list[dict[str, Any]] | None:
    if given is None or given == []:
        return None
    given = given if isinstance(given, list) else [given]
    calls = []
    for place, call in enumerate(given):
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict):
            raise Unfit("unparsable tool call")
        name = call["id"] if isinstance(call, dict) and isinstance(call.get("id"), str) else f"call_{number}_{place}"
        calls.append(tool_call(function.get("name"), function.get("arguments"), name))
    return calls
