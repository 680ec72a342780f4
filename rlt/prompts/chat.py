"""Conversations as a tokenizer's chat template writes them: the same text on any day, whoever has a system role."""

import re
from datetime import datetime

from jinja2 import TemplateError

# What a template that writes today's date is told, whatever the day: prompts of a run stay what they were after
# midnight and after a resume. Llama 3's own template falls back to this day.
TODAY = datetime(2024, 7, 26)
BEGUN_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")


def render_chat(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The text of a conversation.

    Raises:
        TemplateError: the template does not take it.
    """
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, strftime_now=TODAY.strftime
    )


def render_with_system(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation that begins with a system text; a template without that role gets it in front of the question.

    Raises:
        TemplateError: the template does not take that either.
    """
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt)
    except TemplateError:
        text = ""
    system = messages[0]["content"]
    if system.strip() not in text:  # some templates trim
        merged = {"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}
        text = render_chat(tokenizer, [merged, *messages[2:]], add_generation_prompt)
    return text


def without_begun_thought(prompt: str) -> str:
    """A prompt without the thought, open or empty, that its template begins the answer with.

    The tags of a style say where thoughts are; behind a begun `<think>` they would stand in, or after, another thought.
    """
    return BEGUN_THOUGHT.sub("", prompt)
