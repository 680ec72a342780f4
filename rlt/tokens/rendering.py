"""Conversations as the text of a model's own chat template, and which characters of it a loss counts.

A template that marks what it generates says so itself. Of any other, a turn's characters are those between two
renderings, each of which must begin the whole text: that of the turns before it with the prompt for an answer, and that
of the turns up to it. Both stand for what a model is shown and asked to write.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from rlt.formats.record import Dropped, Record, texts_of

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_THOUGHT = "a thought that no template has"
PROBE_CALL = {"name": "a_call_that_no_template_has", "arguments": {"number": "an argument that no template has"}}
PROBE_TOOL = {"name": "a_tool_that_no_template_has", "description": "none", "parameters": {"type": "object"}}
THOUGHT_FIELDS = ("reasoning_content", "thinking")  # by which templates know a turn's thought

REFUSED = "conversation that the chat template refuses"
SPECIAL = "special token of the tokenizer in its text"
THOUGHTLESS = "thought that the chat template leaves out"
CALLLESS = "tool call that the chat template leaves out"
TOOLLESS = "tools that the chat template leaves out"
TURNLESS = "turn that the chat template leaves out"
NOT_ASKED = "no turn that the chat template asks for as it renders it"
TWO_ANSWERS = "two answers to choose from"


@dataclass(frozen=True)
class Rendered:
    """A text, and the half-open ranges of its characters that are trained, in order.

    Args:
        untrained: turns that would be trained, but that the template renders otherwise once others follow.
    """

    text: str
    spans: list[tuple[int, int]]
    untrained: int = 0


class ChatRenderer:
    """Records by one tokenizer's chat template.

    Args:
        tokenizer: of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        self.marks = GENERATION.search(self.template) is not None
        self.specials = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.special = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        self.in_field = self._shows_thoughts(in_field=True)
        self.shows_thoughts = self.in_field or self._shows_thoughts(in_field=False)
        self.shows_calls, self.shows_tools = self._shows_calls(), self._shows_tools()

    def __call__(self, record: Record) -> Rendered | Dropped:
        """The text of a conversation.

        Returns:
            why there is none: the template refuses it, leaves a part out, or no turn is as the model would be asked.
        """
        from jinja2 import TemplateError

        if record["chosen"]:
            return Dropped(TWO_ANSWERS)
        turns = record["messages"]
        if any(map(self.special.search, texts_of(record))):
            return Dropped(SPECIAL)
        if not self.shows_thoughts and any(turn["thinking"] for turn in turns if _trains(turn)):
            return Dropped(THOUGHTLESS)
        if not self.shows_calls and any(turn["tool_calls"] for turn in turns):
            return Dropped(CALLLESS)
        if not self.shows_tools and record["tools"]:
            return Dropped(TOOLLESS)
        messages = [self._message(turn) for turn in turns]
        try:
            rendered = (self._marked if self.marks else self._by_prefixes)(messages, turns, record["tools"] or None)
        except (TemplateError, TypeError) as error:  # templates add texts to what is none
            if isinstance(error, TypeError) and "concatenate" not in str(error):
                raise
            return Dropped(REFUSED)
        if rendered is None or not rendered.spans and rendered.untrained:
            return Dropped(NOT_ASKED)
        if not self._keeps_thoughts(rendered, turns):
            return Dropped(THOUGHTLESS)
        left_out = _left_out(rendered, record)
        return rendered if left_out is None else Dropped(left_out)

    def _render(self, messages: list[dict], tools: list | None, asks: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)

    def _by_prefixes(self, messages: list[dict], turns: list[dict], tools: list | None) -> Rendered:
        text, spans, untrained = self._render(messages, tools), [], 0
        for number, turn in enumerate(turns):
            if not _trains(turn):
                continue
            asked = self._render(messages[:number], tools, asks=True) if number else ""
            last = number == len(turns) - 1
            through = text if last else self._render(messages[: number + 1], tools)
            begins = text.startswith(through) and through.startswith(asked)
            if number and begins and len(asked) < len(through):
                spans.append((len(asked), self._end(text, len(asked), len(through))))
            else:
                untrained += 1
        return Rendered(text, spans, untrained)

    def _marked(self, messages: list[dict], turns: list[dict], tools: list | None) -> Rendered | None:
        """By the template's own marks; None where they do not tell turns apart."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"chat_template": self.template, "return_assistant_tokens_mask": True, "tools": tools}
        special = self.tokenizer.special_tokens_map
        (text,), (marked,) = render_jinja_template([messages], **options, **special)
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if len(marked) != len(answers):
            return None
        spans: list[Any] = [span for span, turn in zip(marked, answers, strict=True) if _trains(turn)]
        return Rendered(text, [(start, end) for start, end in spans])

    def _end(self, text: str, start: int, end: int) -> int:
        """Without the blanks that a template puts behind the token that ends a turn, which no model writes."""
        written = text[start:end].rstrip()
        return start + len(written) if written.endswith(self.specials) else end

    def _message(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn as templates know it."""
        role = "system" if turn["role"] == "developer" and "developer" not in self.template else turn["role"]
        message: dict[str, Any] = {"role": role, "content": turn["content"] or ""}
        if turn["thinking"]:
            if self.in_field:
                message |= dict.fromkeys(THOUGHT_FIELDS, turn["thinking"])
            else:
                message["content"] = f"<think>\n{turn['thinking']}\n</think>\n\n{message['content']}"
        if turn["tool_calls"]:
            functions = [{"name": c["name"], "arguments": c["arguments"]} for c in turn["tool_calls"]]
            ids = [c.get("id") for c in turn["tool_calls"]]
            message["tool_calls"] = [
                {"type": "function", "function": function, **({"id": own} if own else {})}
                for function, own in zip(functions, ids, strict=True)
            ]
        return message | {key: turn[key] for key in ("tool_call_id", "name") if turn[key]}

    def _shows_thoughts(self, in_field: bool) -> bool:
        from jinja2 import TemplateError

        answer = {"role": "assistant", "content": "B"}
        if in_field:
            answer |= dict.fromkeys(THOUGHT_FIELDS, PROBE_THOUGHT)
        else:
            answer["content"] = f"<think>\n{PROBE_THOUGHT}\n</think>\n\nB"
        try:
            return PROBE_THOUGHT in self._render([{"role": "user", "content": "A"}, answer], None)
        except TemplateError:
            return False

    def _shows_calls(self) -> bool:
        """Whether a call stands in the text, by its name and what it is given."""
        call = {"type": "function", "id": "abcdefghi", "function": PROBE_CALL}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self._shows([answer], None, PROBE_CALL["name"], PROBE_CALL["arguments"]["number"])

    def _shows_tools(self) -> bool:
        answer = {"role": "assistant", "content": "B"}
        return self._shows([answer], [{"type": "function", "function": PROBE_TOOL}], PROBE_TOOL["name"])

    def _shows(self, answers: list[dict], tools: list | None, *wanted: str) -> bool:
        from jinja2 import TemplateError

        try:
            text = self._render([{"role": "user", "content": "A"}, *answers], tools)
        except (TemplateError, TypeError):  # each row will show whether it takes one
            return True
        return all(one in text for one in wanted)

    def _keeps_thoughts(self, rendered: Rendered, turns: list[dict]) -> bool:
        """Whether each thought that is trained stands in the text."""
        if rendered.untrained:  # of turns that stand otherwise in it the thoughts may be left out
            turns = [turn for turn in turns if _trains(turn)][-1:]
        trained = "".join(rendered.text[start:end] for start, end in rendered.spans)
        return all(turn["thinking"].strip() in trained for turn in turns if _trains(turn) and turn["thinking"])


def _left_out(rendered: Rendered, record: Record) -> str | None:
    """What of a conversation does not stand in its text, if anything; what is trained, not in the trained part."""
    turns, tools = record["messages"], record["tools"] or []
    trained = "".join(rendered.text[start:end] for start, end in rendered.spans)
    for turn in turns:
        text = trained if _trains(turn) and not rendered.untrained else rendered.text
        if not all(call["name"] in text for call in turn["tool_calls"] or ()):
            return CALLLESS
        content = (turn["content"] or "").strip()
        if not any(form in text for form in (content, json.dumps(content, ensure_ascii=False)[1:-1])):
            return TURNLESS
    named = [(tool.get("function") or tool).get("name") or "" for tool in tools]
    return None if all(name in rendered.text for name in named) else TOOLLESS


def _trains(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn["train"]
