"""A model's tokenizer and chat template, without torch: the server answers while its workers load theirs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from rlt.errors import Refused

KEPT = 16  # tokenizers
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Texts:
    tokenizer: Tokenizer
    template: Template | None
    special: Mapping[str, str]  # names that a template may use

    def tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        whole = [text.encode("utf-8", "replace").decode() for text in texts]  # a lone surrogate has no tokens
        return [each.ids for each in self.tokenizer.encode_batch(whole, add_special_tokens=add_special_tokens)]

    def texts(self, tokens: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return self.tokenizer.decode_batch([list(ids) for ids in tokens], skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        """
        Raises:
            Refused: the tokenizer has no template, or the template has no form for these messages.
        """
        if self.template is None:
            raise Refused("the model's tokenizer has no chat template")
        for each in messages:
            if not isinstance(each, dict) or not isinstance(each.get("role"), str):
                raise Refused(f"a message is {each!r}: give role and content")
        try:
            return self.template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Refused(f"the chat template does not take these messages: {error}") from error


@lru_cache(KEPT)
def read_texts(folder: str) -> Texts:
    place = Path(folder)
    if not (place / "tokenizer.json").is_file():
        raise Refused(f"{folder} holds no tokenizer.json")
    settings = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    given = {name: settings.get(name) for name in SPECIAL}
    special = {name: each["content"] if isinstance(each, dict) else each for name, each in given.items() if each}
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Texts(tokenizer, _template(place, settings), special)


def _template(place: Path, settings: Mapping[str, Any]) -> Template | None:
    """In the environment that chat templates are written for (transformers' `apply_chat_template`)."""
    beside = place / "chat_template.jinja"
    source = beside.read_text(encoding="utf-8") if beside.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_complain, strftime_now=_now)
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _complain(message: str) -> NoReturn:
    raise TemplateError(message)
