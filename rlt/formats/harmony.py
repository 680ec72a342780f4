"""The harmony family: code, completions, agents, preferences, tasks with tests, repairs."""

from typing import Any

from rlt.formats.chat import chat_messages
from rlt.formats.columns import Columns, Options, Unfit, dialogue, match_results, tool_call, tool_list
from rlt.formats.record import Record, make_record, message

CODE = {"kind": "code"}


def code(row: Columns, options: Options) -> Record:
    """Files of code, as text."""
    path = row.optional("path")
    return make_record("text", text=row.text("content", "text"), meta={**CODE, **({"path": path} if path else {})})


def completion(row: Columns, options: Options) -> Record:
    """A prompt, with a context where there is one, and its completion."""
    context = row.optional("context")
    prompt = row.text("prompt", "instruction")
    asked = f"{prompt}\n\n{context}" if context else prompt
    return make_record("chat", messages=dialogue(asked, row.text("completion", "solution", "output")))


def agent(row: Columns, options: Options) -> Record:
    """A task and the steps of an agent: thought, calls, their results, response."""
    prompt = row.optional("developer_prompt")
    turns = [message("developer", prompt)] if prompt else []
    turns.append(message("user", row.text("task")))
    for step in row.items("trajectory", of=dict):
        turns += _step(Columns(step))
    return make_record("chat", messages=match_results(turns), tools=tool_list(row.value("tools")))


def _step(step: Columns) -> list[dict[str, Any]]:
    thought, response = step.optional("thinking"), step.optional("response")
    given, results = step.value("tool_calls") or [], step.value("tool_results") or []
    if not all(isinstance(part, list) and all(isinstance(p, dict) for p in part) for part in (given, results)):
        raise Unfit("bad_column:trajectory")
    calls = [tool_call(call.get("name"), call.get("arguments"), str(call.get("id"))) for call in given]
    if any(not isinstance(result.get("output"), str) for result in results):
        raise Unfit("bad_column:trajectory")
    said = [message("tool", result["output"], tool_call_id=str(result.get("id"))) for result in results]
    if calls:
        last = [message("assistant", response)] if response else []
        return [message("assistant", None, thinking=thought, tool_calls=calls), *said, *last]
    if response is None:
        raise Unfit("empty_assistant")
    return [*said, message("assistant", response, thinking=thought)]


def preference(row: Columns, options: Options) -> Record:
    """A prompt with a better and a worse answer; as text, or as messages."""
    prompt = _turns(row, "prompt", "user")
    chosen, rejected = (_turns(row, name, "assistant") for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Unfit("chosen equals rejected")
    return make_record("preference", messages=prompt, chosen=chosen, rejected=rejected)


def _turns(row: Columns, name: str, role: str) -> list[dict[str, Any]]:
    given = row.value(name)
    return (
        chat_messages(given) if isinstance(given, list) else chat_messages([{"role": role, "content": row.text(name)}])
    )


def task(row: Columns, options: Options) -> Record:
    """A task with tests, which are no part of its prompt; a solution, where there is one, is its answer."""
    starter, solution = row.optional("starter_code"), row.optional("solution")
    asked = "\n\n".join(filter(None, (row.text("description"), starter)))
    turns = dialogue(asked, solution) if solution else [message("user", asked)]
    return make_record("rl", messages=turns, tests=row.text("tests"), meta=dict(CODE))


def debug(row: Columns, options: Options) -> Record:
    """Code with a fault and what it reports; then the repaired code, behind an explanation where there is one."""
    buggy, fixed = row.text("buggy_code"), row.text("fixed_code", "fix")
    if buggy.strip() == fixed.strip():
        raise Unfit("fixed code equals buggy code")
    asked = f"{buggy}\n\n{row.text('error_message', 'compiler_error')}"
    answer = "\n\n".join(filter(None, (row.optional("explanation"), fixed)))
    return make_record("chat", messages=dialogue(asked, answer), meta=dict(CODE))
