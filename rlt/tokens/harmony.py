"""Conversations in the harmony format of gpt-oss, by its official renderer, and which of its tokens are trained.

    <|start|>assistant<|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>final<|message|>an answer<|return|>

The renderer's own default leaves the thought of the turn out that it is asked to train; here every thought stays. Its
vocabulary comes from the package bpe-openai, so that nothing is fetched.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rlt.formats.record import Dropped, Record

VOCABULARY = "o200k_base.tiktoken"
VOCABULARY_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"  # a folder, in which the renderer looks for it
FINGERPRINT = "o200k_harmony"
REASONING = "high"  # what the system message asks for: rows with thoughts in full are what a student is to write
HEADER = 2  # tokens of `<|start|>assistant`, with which a model is asked


class Encoded(NamedTuple):
    """A row's tokens, and for each whether it is trained (1 or 0)."""

    ids: list[int]
    mask: list[int]


class Part(NamedTuple):
    """A message of the renderer.

    Args:
        trained: whether an assistant wrote it, whose turn is trained.
        asked: whether a model writes it after `<|start|>assistant`; else it goes on by itself from the part before.
        ends: whether it is the last of its turn.
    """

    message: Any
    trained: bool = False
    asked: bool = True
    ends: bool = True


class HarmonyEncoder:
    """Records to tokens.

    Attributes:
        fingerprint: of the vocabulary.
        counted: figures beside rows.
    """

    def __init__(self):
        self.encoding = load_encoding()
        self.fingerprint = FINGERPRINT
        self.counted: Counter[str] = Counter()

    def __call__(self, records: list[Record]) -> list[Encoded | Dropped]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> Encoded | Dropped:
        """What a model is trained to write: all of a trained turn behind `<|start|>assistant`, to `<|return|>` or
        `<|call|>`. Of an answer inside of the conversation the `<|end|>` is not trained, as a model ends with
        `<|return|>`, which only the last one has."""
        from openai_harmony import HarmonyError, RenderOptions

        if record["kind"] not in ("chat", "rl"):
            return Dropped(f"of kind {record['kind']}, not a conversation")
        options = RenderOptions(conversation_has_function_tools=bool(record["tools"]))
        parts = list(parts_of(record))
        found = Encoded([], [])
        try:
            for part in parts:
                tokens = self.encoding.render(part.message, options)
                found.ids.extend(tokens)
                found.mask.extend(self._mask(part, tokens))
        except HarmonyError:
            return Dropped("conversation that harmony refuses")
        if not any(found.mask):
            return Dropped("no token that is trained")
        if parts[-1].message.channel == "final":
            found.ids[-1], found.mask[-1] = self.special("<|return|>"), int(parts[-1].trained)
        return found

    def _mask(self, part: Part, tokens: list[int]) -> list[int]:
        mask = [int(part.trained)] * len(tokens)
        if part.asked:
            mask[:HEADER] = [0] * HEADER
        if part.ends and tokens[-1] == self.special("<|end|>"):
            mask[-1] = 0
        return mask

    def special(self, token: str) -> int:
        return self.encoding.encode(token, allowed_special="all")[0]


def parts_of(record: Record) -> Iterator[Part]:
    """The messages of a conversation: system, developer (instructions and tools), then its turns."""
    from openai_harmony import Author, Message, Role, SystemContent

    system = SystemContent.new().with_reasoning_effort(_effort())
    yield Part(Message.from_role_and_content(Role.SYSTEM, system))
    yield from _developer(record)
    for turn in record["messages"]:
        if turn["role"] == "user":
            yield Part(Message.from_role_and_content(Role.USER, turn["content"] or ""))
        elif turn["role"] == "tool":
            author = Author.new(Role.TOOL, f"functions.{turn['name']}")
            result = Message.from_author_and_content(author, turn["content"] or "")
            yield Part(result.with_channel("commentary").with_recipient("assistant"))
        elif turn["role"] == "assistant":
            yield from _assistant(turn)


def _effort() -> Any:
    from openai_harmony import ReasoningEffort

    return ReasoningEffort(REASONING.capitalize())


def _developer(record: Record) -> Iterator[Part]:
    """System prompts are instructions here: the system message states what the model is."""
    from openai_harmony import DeveloperContent, Message, Role, ToolDescription

    given = [turn["content"] for turn in record["messages"] if turn["role"] in ("system", "developer")]
    if not given and not record["tools"]:
        return
    content = DeveloperContent.new()
    if given:
        content = content.with_instructions("\n\n".join(given))
    if record["tools"]:
        functions = [tool["function"] for tool in record["tools"]]
        content = content.with_function_tools(
            [ToolDescription.new(f["name"], f.get("description") or "", f.get("parameters")) for f in functions]
        )
    yield Part(Message.from_role_and_content(Role.DEVELOPER, content))


def _assistant(turn: dict[str, Any]) -> Iterator[Part]:
    """Thought, then answer; or thought, what is said before a call, and the calls, each of which ends a turn."""
    from openai_harmony import Message, Role

    said: list[Any] = []

    def say(text: str, channel: str) -> Any:
        said.append(Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel))
        return said[-1]

    calls = turn["tool_calls"] or []
    if turn["thinking"]:
        say(turn["thinking"], "analysis")
    if turn["content"]:
        say(turn["content"], "commentary" if calls else "final")
    for call in calls:
        one = say(json.dumps(call["arguments"], ensure_ascii=False, separators=(",", ":")), "commentary")
        said[-1] = one.with_recipient(f"functions.{call['name']}").with_content_type("<|constrain|>json")
    first_call = len(said) - len(calls)
    for n, message in enumerate(said):
        yield Part(message, turn["train"], asked=n == 0 or n > first_call, ends=n == len(said) - 1 or n >= first_call)


def load_encoding() -> Any:
    """The renderer, with its vocabulary of a folder that is there for as long as it is read."""
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    held = os.environ.get(VOCABULARY_VARIABLE)
    with TemporaryDirectory() as folder:
        packed = files("bpe_openai").joinpath("data", f"{VOCABULARY}.gz").read_bytes()
        (Path(folder) / VOCABULARY).write_bytes(gzip.decompress(packed))
        os.environ[VOCABULARY_VARIABLE] = folder
        try:
            return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
        finally:
            os.environ.pop(VOCABULARY_VARIABLE)
            if held is not None:
                os.environ[VOCABULARY_VARIABLE] = held
