"""The rows that other runs read: `to=rows` for teachers and students, chat, preference or text for other trainers.

<output>/prepared/train-00000.jsonl      and validation-00000.jsonl, where a share is held out

    rows        {question, solution, reasoning_trace, answer, id, source}, and system where there is one
    chat        {messages, tools, id, source}, messages and tools as OpenAI writes them, thoughts as reasoning_content
    preference  {prompt, chosen, rejected, id, source}, each a list of messages
    text        {text, id, source}
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import orjson

from rlt.durable import written_whole
from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, texts_of
from rlt.preparation.ledger import Counts
from rlt.preparation.shards import shard, writing
from rlt.preparation.split import TRAIN, sides
from rlt.preparation.stage import Pass, Stage, Task
from rlt.runs.folder import PREPARED

Row = dict[str, Any]


def as_rows(record: Record) -> Row | Dropped:
    """A question, its solution, and the thought between them; of kind rl without an answer, the gold one."""
    if record["kind"] not in ("chat", "rl"):
        return Dropped(f"of kind {record['kind']}, not a question")
    turns = record["messages"]
    if record["tools"] or any(turn["tool_calls"] or turn["role"] == "tool" for turn in turns):
        return Dropped("calls tools")
    asked, answered = ([turn for turn in turns if turn["role"] == role] for role in ("user", "assistant"))
    if len(asked) != 1 or len(answered) > 1 or turns.index(asked[0]) > turns.index((answered or asked)[0]):
        return Dropped("not one question and one answer")
    solution = answered[0]["content"] if answered else record["answer"]
    if not solution or not solution.strip():
        return Dropped("no solution")
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] in ("system", "developer"))
    row = {"question": asked[0]["content"], "solution": solution}
    row |= {"reasoning_trace": answered[0]["thinking"] if answered else None, "answer": record["answer"]}
    return row | ({"system": system} if system else {})


def as_chat(record: Record) -> Row | Dropped:
    """A conversation that ends with an answer."""
    if record["kind"] == "rl" and record["messages"][-1]["role"] != "assistant":
        return Dropped("a question without an answer")
    if record["kind"] not in ("chat", "rl"):
        return Dropped(f"of kind {record['kind']}, not a conversation")
    return {"messages": openai_messages(record["messages"]), "tools": record["tools"]}


def as_preference(record: Record) -> Row | Dropped:
    """A better and a worse answer to one prompt."""
    if record["kind"] != "preference":
        return Dropped(f"of kind {record['kind']}, not a preference")
    lists = {"prompt": record["messages"], "chosen": record["chosen"], "rejected": record["rejected"]}
    return {name: openai_messages(turns) for name, turns in lists.items()}


def as_text(record: Record) -> Row | Dropped:
    """Plain text."""
    if record["kind"] != "text":
        return Dropped(f"of kind {record['kind']}, not text")
    return {"text": record["text"]}


FORMS: dict[str, Callable[[Record], Row | Dropped]] = {
    "rows": as_rows,
    "chat": as_chat,
    "preference": as_preference,
    "text": as_text,
}


def openai_messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns as OpenAI's API and chat templates have them; only keys that have a value."""
    return [_openai_message(turn) for turn in turns]


def _openai_message(turn: dict[str, Any]) -> dict[str, Any]:
    found = {"role": turn["role"], "content": turn["content"], "reasoning_content": turn["thinking"]}
    calls = [
        {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in turn["tool_calls"] or ()
    ]
    found |= {"tool_calls": calls or None, "tool_call_id": turn["tool_call_id"], "name": turn["name"]}
    if turn["role"] == "assistant" and not turn["train"]:
        found["train"] = False
    return {key: value for key, value in found.items() if value is not None or key == "content"}


class Write(Stage):
    """Writes what comes out; rows that do not have the form that is asked for are dropped."""

    name = "write"
    keys = ("to",)
    outputs = (PREPARED,)

    def check(self) -> None:
        if self.settings.to not in FORMS:
            raise Refused(f"to={self.settings.to}: use one of {', '.join(FORMS)}")

    def passes(self) -> list[Pass]:
        return [Pass("rows", self.task)]

    def task(self, task: Task) -> Counts:
        counts, form = Counts(), FORMS[self.settings.to]
        folder = task.place.output / PREPARED
        folder.mkdir(exist_ok=True)
        with ExitStack() as files:
            keep = files.enter_context(writing(shard(task.place.shards, task.number)))
            drop = files.enter_context(writing(shard(task.place.dropped, task.number)))
            out = {}
            for split in sides(self.settings):
                aside = files.enter_context(written_whole(folder / f"{split}-{task.number:05d}.jsonl"))
                out[split] = files.enter_context(aside.open("wb"))
            for record in task.rows():
                row = form(record)
                if isinstance(row, Dropped):
                    counts.take(record["source"], row.reason)
                    drop({"reason": row.reason, "score": None, **record})
                    continue
                counts.take(record["source"], None, sum(map(len, texts_of(record))))
                keep(record)
                split = record["meta"].get("split", TRAIN)
                counts.notes[f"rows of {split}"] += 1
                out[split].write(orjson.dumps({**row, "id": record["id"], "source": record["source"]}) + b"\n")
        return counts
