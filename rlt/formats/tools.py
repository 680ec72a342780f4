"""Calls of functions, each in the public set's own syntax."""

import ast
import json
import re
from typing import Any

from rlt.formats.chat import content_of, role_of
from rlt.formats.columns import (
    Columns,
    Options,
    Unfit,
    decoded_objects,
    dialogue,
    match_results,
    parsed,
    split_thought,
    tool_call,
    tool_list,
)
from rlt.formats.record import Dropped, Record, make_record, message

GLAIVE_TURN = re.compile(r"(?:\A\s*|\n\n\n)(USER|ASSISTANT|FUNCTION RESPONSE):[ \n]?")
GLAIVE_CALL = re.compile(
    r'<functioncall>\s*\{\s*"name":\s*"([^"]+)"(?:\s*,\s*"arguments":\s*(.*?))?\s*\}\s*\Z', re.DOTALL
)
GLAIVE_END = "<|endoftext|>"
HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
HERMES_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
HERMES_TOOLS = re.compile(r"\s*<tools>\s*(.*?)\s*</tools>", re.DOTALL)
APIBENCH = re.compile(r"\A\s*#*\s*Instruction:\s*(.+?)\s*#*\s*Output:\s*(.+?)\s*\Z", re.DOTALL)
TOOLBENCH_STEP = re.compile(
    r"\A\s*(?:Thought:\s*(.*?))?\s*\bAction:\s*(\S+)\s*\n\s*Action Input:\s*(.*?)\s*\Z", re.DOTALL
)
TOOLBENCH_TOOLS = re.compile(r"(following APIs:)\s*(\[.*\])\s*\Z", re.DOTALL)


def glaive(row: Columns, options: Options) -> Record:
    """glaiveai/glaive-function-calling-v2: turns in one text; a call's arguments are single-quoted JSON."""
    system, objects = decoded_objects(row.text("system").strip().removeprefix("SYSTEM:").strip())
    first, *parts = GLAIVE_TURN.split(row.text("chat"))
    if first.strip() or not parts:
        raise Unfit("text before the first turn")
    turns = [_glaive_turn(n, role, text) for n, (role, text) in enumerate(zip(parts[::2], parts[1::2], strict=True))]
    head = [message("system", system.strip().removesuffix("-").strip())] if system.strip() else []
    return make_record("chat", messages=[*head, *match_results(turns)], tools=tool_list(objects))


def _glaive_turn(number: int, role: str, text: str) -> dict[str, Any]:
    text = text.strip().removesuffix(GLAIVE_END).strip()
    if not text:
        raise Unfit("empty_assistant" if role == "ASSISTANT" else "empty_user")
    if role != "ASSISTANT":
        return message("user" if role == "USER" else "tool", text)
    if "<functioncall>" not in text:
        return message("assistant", text)
    call = GLAIVE_CALL.search(text)
    if call is None:
        raise Unfit("unparsable tool call")
    return message("assistant", text[: call.start()].strip() or None, tool_calls=[_glaive_call(call, number)])


def _glaive_call(call: re.Match[str], number: int) -> dict[str, Any]:
    name, arguments = call.groups()
    if arguments and arguments[0] == arguments[-1] == "'":
        arguments = arguments[1:-1].replace("\\'", "'")
    return tool_call(name, arguments or "", number)


def hermes(row: Columns, options: Options) -> Record:
    """NousResearch/hermes-function-calling-v1: calls in `<tool_call>`, at times as Python writes them; tools stand in
    their column, and again in the system prompt, which is cut free of them."""
    tools, turns = tool_list(row.value("tools")), []
    for number, turn in enumerate(row.items("conversations", of=dict)):
        role, text = role_of(turn), content_of(turn) or ""
        if role == "system":
            block = HERMES_TOOLS.search(text)
            tools = tools or tool_list(block and block.group(1))
            text = HERMES_TOOLS.sub("", text).strip()
            turns += [message("system", text)] if text else []
        elif role == "tool":
            turns += [message("tool", result) for result in HERMES_RESULT.findall(text) or [text]]
        elif not text.strip():
            raise Unfit(f"empty_{role}")
        else:
            turns.append(_hermes_answer(text, number) if role == "assistant" else message(role, text))
    return make_record("chat", messages=match_results(turns), tools=tools)


def _hermes_answer(text: str, number: int) -> dict[str, Any]:
    thought, text = split_thought(text)
    given = [parsed(call, "unparsable tool call") for call in HERMES_CALL.findall(text)]
    if not all(isinstance(call, dict) for call in given) or text.count("<tool_call>") != len(given):
        raise Unfit("unparsable tool call")
    calls = [tool_call(c.get("name"), c.get("arguments"), f"call_{number}_{n}") for n, c in enumerate(given)]
    return message("assistant", HERMES_CALL.sub("", text).strip() or None, thinking=thought, tool_calls=calls or None)


def gorilla(row: Columns, options: Options) -> Record:
    """Gorilla: OpenFunctions v1 (a call as Python writes it), and APIBench (instruction and output in one text)."""
    if "api_call" in row.row:
        messages = dialogue(*_instruction_and_output(row.text("code")))
        return make_record("chat", messages=messages, answer=row.text("api_call"), meta={"kind": "code"})
    calls = _python_calls(row.text("model_answer"))
    turns = [message("user", row.text("question")), message("assistant", None, tool_calls=calls)]
    return make_record("chat", messages=turns, tools=tool_list(row.value("function")), answer=row.row["model_answer"])


def _instruction_and_output(text: str) -> tuple[str, str]:
    """Of `###Instruction: ... ###Output: ...`, or of a dictionary as Python writes it."""
    if found := APIBENCH.match(text):
        return found.group(1), found.group(2)
    given = parsed(text, "no instruction in its text")
    asked, output = (given.get("Instruction"), given.get("Output")) if isinstance(given, dict) else (None, None)
    if not isinstance(asked, str) or not output:
        raise Unfit("no instruction in its text")
    return asked, output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)


def _python_calls(text: str) -> list[dict[str, Any]]:
    try:
        found = ast.parse(text.strip(), mode="eval").body
        nodes = found.elts if isinstance(found, ast.List | ast.Tuple) else [found]
        return [_python_call(node, number) for number, node in enumerate(nodes)]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unfit("unparsable tool call") from None


def _python_call(node: ast.expr, number: int) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise Unfit("unparsable tool call")
    values = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    return tool_call(ast.unparse(node.func), values, number)


def toolbench_query(row: dict[str, Any]) -> str:
    """What the rows of one trajectory share: their id without `Step 4: `."""
    found = row.get("id")
    if not isinstance(found, str):
        raise Unfit("bad_column:id")
    return re.sub(r"\AStep \d+:\s*", "", found)


def toolbench(rows: list[Columns], options: Options) -> list[Record | Dropped]:
    """OpenBMB/ToolBench, the rows of one query: a trajectory comes once for each of its steps, of which the longest
    is kept; of one that branches off, the loss counts what no other has."""
    given = [found if isinstance(found := row.value("conversations"), list) else [] for row in rows]
    results: dict[int, Record | Dropped] = {}
    kept: list[list[Any]] = []
    for place in sorted(range(len(rows)), key=lambda n: -len(given[n])):
        shared = max((_common(given[place], other) for other in kept), default=0)
        if given[place] and shared == len(given[place]):
            results[place] = Dropped("beginning of a longer row")
            continue
        try:
            results[place] = record = _trajectory(rows[place])
        except Unfit as unfit:
            results[place] = Dropped(unfit.reason)
            continue
        kept.append(given[place])
        for turn in record["messages"][:shared]:
            turn["train"] = False
    return [results[place] for place in range(len(rows))]


def _common(one: list[Any], other: list[Any]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _trajectory(row: Columns) -> Record:
    turns, tools = [], []
    for number, turn in enumerate(row.items("conversations", of=dict)):
        role, text = role_of(turn), content_of(turn) or ""
        if role == "system" and (found := TOOLBENCH_TOOLS.search(text)):
            tools = tool_list(found.group(2))
            text = text[: found.end(1)]
        turns.append(_toolbench_answer(text, number) if role == "assistant" else message(role, text))
    last = (turns[-1]["tool_calls"] or [{}])[0].get("arguments", {}).get("final_answer")
    answer = last if isinstance(last, str) else None
    meta = {"group": toolbench_query(row.row)}
    return make_record("chat", messages=match_results(turns), tools=tools, answer=answer, meta=meta)


def _toolbench_answer(text: str, number: int) -> dict[str, Any]:
    found = TOOLBENCH_STEP.match(text)
    if found is None:
        raise Unfit("unparsable tool call")
    thought, name, arguments = found.groups()
    return message("assistant", None, thinking=thought or None, tool_calls=[tool_call(name, arguments, number)])
