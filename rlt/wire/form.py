"""Fields of a JSON body, each as the type that it must have, or one clear error."""

import json
import re
from collections.abc import Mapping
from typing import Any

from rlt.errors import Refused

SEQ_LIMIT = 2**63  # numbers of requests are kept in 64 bits
TEXT_LIMIT = 512
UNFIT = re.compile("[\0\ud800-\udfff]")  # characters that no database keeps


def parse(body: bytes) -> dict[str, Any]:
    try:
        return mapping(json.loads(body or b"{}", parse_constant=_no_number), "the body")
    except (ValueError, RecursionError) as error:
        raise Refused("the body is no JSON object") from error


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{name} is no JSON object")
    return value


def texts_or_none(form: Mapping[str, Any], name: str) -> dict[str, str] | None:
    if form.get(name) is None:
        return None
    texts = mapping(form[name], name)
    if not all(isinstance(value, str) for value in texts.values()):
        raise Refused(f"{name} holds values that are no texts")
    return texts


def sequence(value: Any, name: str) -> list:
    if not isinstance(value, list):
        raise Refused(f"{name} is no list")
    return value


def text(form: Mapping[str, Any], name: str) -> str:
    value = form.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_LIMIT or UNFIT.search(value):
        raise Refused(f"{name} is no text of 1 to {TEXT_LIMIT} characters")
    return value


def text_or_none(form: Mapping[str, Any], name: str) -> str | None:
    return None if form.get(name) is None else text(form, name)


def whole(value: Any, name: str, least: int = 0, most: int = SEQ_LIMIT - 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"{name} is {value!r}: give a whole number from {least} to {most}")
    return value


def flag(form: Mapping[str, Any], name: str, default: bool) -> bool:
    value = form.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refused(f"{name} is {value!r}: give true or false")
    return value
