"""The normal form in which exact duplicates are equal, as hashes: NFC, lower case, one space for any whitespace.

Texts are taken many at once: what is ASCII, or becomes so by its few other letters, goes through one table and a few
operations on the array of all bytes, since a pass in Python over each text's spaces is what a normal form costs.
"""

import re
import unicodedata
from typing import Any

import numpy as np
import orjson
import xxhash

from rlt.formats.record import LISTS, PLAIN, Record

FOLD = bytes((32 if chr(c).isspace() else ord(chr(c).lower())) if c < 128 else c for c in range(256))
ASCII = bytes(range(128))
SPACES = re.compile(r"\s+")
NOT_ALONE = re.compile(r"[\s\u0300-\u036f]")  # a space, or what makes one letter of itself and an ASCII one before it
PLAIN_STRINGS = ("role", "name", "tool_call_id", "id")  # of a message or a call: no texts


def utf8(text: str) -> bytes:
    """A text whose letters beyond ASCII have the normal form; ASCII ones need not have it yet."""
    if text.isascii():
        return text.encode()
    text = unicodedata.normalize("NFC", text)
    encoded = text.encode()
    beyond = encoded.translate(None, ASCII).decode()
    if beyond == beyond.lower() and not NOT_ALONE.search(beyond):
        return encoded
    return SPACES.sub(" ", unicodedata.normalize("NFC", text.lower())).encode()


def normal_forms(texts: list[str]) -> list[memoryview]:
    """UTF-8 of each text's normal form."""
    if not texts:
        return []
    folded = [utf8(text) for text in texts]
    joined = np.frombuffer(b"\0".join(folded).translate(FOLD), np.uint8)
    ends = np.cumsum([len(text) + 1 for text in folded]) - 1
    space = joined == 32
    again = np.flatnonzero(space[1:] & space[:-1]) + 1  # spaces after a space
    if len(again):
        keep = np.ones(len(joined), bool)
        keep[again] = False
        joined, ends = joined[keep], ends - np.searchsorted(again, ends)
    view = memoryview(joined.tobytes())
    starts = [0, *(ends[:-1] + 1).tolist()]
    return [_stripped(view, start, end) for start, end in zip(starts, ends.tolist(), strict=True)]


def _stripped(view: memoryview, start: int, end: int) -> memoryview:
    start += start < end and view[start] == 32
    end -= start < end and view[end - 1] == 32
    return view[start:end]


def canonical(record: Record) -> tuple[bytes, list[str]]:
    """What a record says: its texts, and JSON of all else, with a text's place for each."""
    if record["kind"] == "text":
        return b"", [record["text"]]
    texts: list[str] = []
    content = {key: _without_texts(record[key], texts) for key in (*PLAIN, *LISTS, "tools")}
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS), texts


def _without_texts(value: Any, texts: list[str]) -> Any:
    if isinstance(value, str):
        texts.append(value)
        return ""
    if isinstance(value, list):
        return [_without_texts(inner, texts) for inner in value]
    if isinstance(value, dict):
        return {k: v if k in PLAIN_STRINGS else _without_texts(v, texts) for k, v in sorted(value.items())}
    return value


def record_hashes(records: list[Record]) -> list[bytes | None]:
    """xxh3-128 of each record's normal form; None: all of its texts are empty."""
    content = [canonical(record) for record in records]
    forms = iter(normal_forms([text for _, texts in content for text in texts]))
    return [_hash(skeleton, [next(forms) for _ in texts]) for skeleton, texts in content]


def _hash(skeleton: bytes, forms: list[memoryview]) -> bytes | None:
    if not any(map(len, forms)):
        return None
    if not skeleton:
        return xxhash.xxh3_128_digest(forms[0])
    return xxhash.xxh3_128_digest(b"".join((skeleton, *map(xxhash.xxh3_128_digest, forms))))


def text_hashes(texts: list[str]) -> list[bytes | None]:
    """xxh3-128 of each text's normal form; None: it is empty."""
    return [xxhash.xxh3_128_digest(form) if form else None for form in normal_forms(texts)]
