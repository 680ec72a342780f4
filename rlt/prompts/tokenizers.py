"""What a tokenizer and its chat template must hold to, seen once at load: prompts are how readings begin.

A teacher samples behind its prompt, and a student is asked and taught by its own; the reward reads both as whole texts.
A template or a tokenizer by which a prompt is not the beginning of that text is refused here with the reason.
"""

import logging
import os
from typing import Any

from jinja2 import TemplateError

from rlt.errors import Refused
from rlt.models.loading import load_tokenizer
from rlt.prompts.chat import render_with_system
from rlt.prompts.rendering import (
    MARK,
    prompt_token_ids,
    render_question,
    render_student_reading,
    render_teacher_prompt,
    render_teacher_reading,
)
from rlt.prompts.styles import ReasoningFormat, check_tags

QUESTION, SOLUTION, THOUGHT = "What is 3 * 4?", "12", "Three fours are 12."  # of the conversations that are tried

logger = logging.getLogger("rlt")


def check_tokenizer(style: ReasoningFormat, tokenizer: Any) -> None:
    """That a model with this tokenizer can be trained, sampled from and read in this style.

    Raises:
        Refused: a tag is a special token, or as in `check_template`.
    """
    check_tags(style, tokenizer)
    check_template(style, tokenizer)


def check_template(style: ReasoningFormat, tokenizer: Any) -> None:
    """That what a model is asked begins what is read of it, in characters and in tokens, and alike each time.

    Raises:
        Refused: the tokenizer has no chat template, or one that does not hold to this; says how.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise Refused(f"{name}: its tokenizer has no chat template: name an instruct model, or put one beside it")
    try:
        _check_conversation(style, tokenizer)
        asked = render_question(tokenizer, style, QUESTION)
        read = render_student_reading(tokenizer, style, QUESTION, SOLUTION, THOUGHT).text
        prompt = render_teacher_prompt(tokenizer, style, QUESTION, SOLUTION)
    except TemplateError as error:
        raise Refused(f"{name}: its chat template does not take a question with its answer ({error})") from error
    explained = render_teacher_reading(style, prompt, THOUGHT).text
    for begins, text in ((asked, read), (prompt, explained)):
        _check_tokens(tokenizer, begins, text)


def _check_conversation(style: ReasoningFormat, tokenizer: Any) -> None:
    """Of the conversation as the template writes it with its answer, that the prompt is how it begins."""
    name = tokenizer.name_or_path
    messages = [{"role": "system", "content": style.student_system}, {"role": "user", "content": QUESTION}]
    asked, again = (render_question(tokenizer, style, QUESTION) for _ in range(2))
    if asked != again:
        raise Refused(f"{name}: its chat template writes another prompt each time, so that none can be read again")
    if QUESTION not in asked:
        raise Refused(f"{name}: its chat template leaves the question out of the prompt, which ends {asked[-40:]!r}")
    whole = render_with_system(tokenizer, [*messages, {"role": "assistant", "content": MARK}])
    if whole.count(MARK) != 1:
        raise Refused(f"{name}: its chat template writes an answer {whole.count(MARK)} times, and has to write it once")
    if not whole.startswith(asked):
        at = len(os.path.commonprefix([asked, whole]))
        raise Refused(
            f"{name}: its chat template writes a question otherwise once it is answered: {asked[at : at + 40]!r} "
            f"becomes {whole[at : at + 40]!r}"
        )


def _check_tokens(tokenizer: Any, prompt: str, text: str) -> None:
    """That a text's tokens begin with its prompt's, that each has one, and that none begins with two BOS tokens."""
    name, unknown = tokenizer.name_or_path, tokenizer.unk_token
    (asked,), ids = prompt_token_ids(tokenizer, [prompt]), tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(asked)] != asked:
        at = len(os.path.commonprefix([asked, ids]))
        raise Refused(
            f"{name}: its tokenizer cuts {tokenizer.decode(asked[at:])!r} at the end of a prompt otherwise when an "
            "answer follows"
        )
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise Refused(f"{name}: its chat template begins a text with {tokenizer.bos_token} twice")
    if unknown is not None and ids.count(tokenizer.unk_token_id) > text.count(unknown):
        raise Refused(f"{name}: its tokenizer has no tokens for some of {prompt!r}")


def load_student_tokenizer(
    name_or_path: str, teacher: Any, style: ReasoningFormat, trust_remote_code: bool = False
) -> Any:
    """What a student reads with: its own tokenizer, and by its own chat template.

    Args:
        name_or_path: of the student, as `resolve_model_path` gives it.
        teacher: the teacher's tokenizer, returned where the student's does the same.

    Raises:
        Refused: it cannot be loaded, or as in `check_template`.
    """
    own = load_tokenizer(name_or_path, trust_remote_code)
    check_template(style, own)
    same_tokens = own.get_vocab() == teacher.get_vocab()
    if same_tokens and own.chat_template == teacher.chat_template:
        return teacher
    if not same_tokens:
        logger.info(
            "student %s has another tokenizer than the teacher: it reads in passes of its own, and the two are "
            "compared over the shortest pieces of text that both cut out",
            name_or_path,
        )
    return own
