"""Objects that JSON can hold and orjson can write: what readers give, whatever their file had."""

import json
import re
from collections import Counter
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import orjson

DEEPEST = 100  # levels; orjson writes 254, of a record's own ones too
LARGEST = 2**63
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBER_NAMES = "NaN, Infinity read as null"
SURROGATES = "lone surrogates replaced"


class NotPlain(Exception):
    """What cannot be a row, with the reason for the ledger."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def parse_object(line: bytes, notes: Counter[str]) -> dict[str, Any]:
    """A line's object.

    Raises:
        NotPlain: it is not JSON, not UTF-8, no object, nested too deeply, or has two values of one key.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = _parse_slowly(line, notes)
    if not isinstance(row, dict):
        raise NotPlain("not a JSON object")
    # A key can stand twice only where its bytes do; in texts a quote has a backslash before it.
    if any(line.count(b'"%b"' % key.encode()) > 1 for key in row):
        _check_keys(line, len(row))
    if line.count(b"[") + line.count(b"{") > DEEPEST:
        return plain(row, notes)
    return row


def _parse_slowly(line: bytes, notes: Counter[str]) -> Any:
    """What orjson refuses and Python's own parser reads: half of a pair of surrogates, NaN."""
    try:
        return plain(json.loads(line.decode("utf-8")), notes)
    except UnicodeDecodeError:
        raise NotPlain("not UTF-8 text") from None
    except json.JSONDecodeError:
        raise NotPlain("not JSON") from None
    except ValueError:  # more digits than Python reads
        raise NotPlain("a number of thousands of digits") from None
    except RecursionError:
        raise NotPlain("nested too deeply") from None


def _check_keys(line: bytes, keys: int) -> None:
    """That the outermost object, whose pairs come last, has each key once."""
    pairs = 0

    def count(found: list[tuple[str, Any]]) -> None:
        nonlocal pairs
        pairs = len(found)

    json.loads(line.decode("utf-8", "replace"), object_pairs_hook=count)
    if pairs != keys:
        raise NotPlain("two values of one key")


def plain(value: Any, notes: Counter[str], depth: int = 0) -> Any:
    """The value with what JSON does not have replaced, each by its one rendering, and counted where it loses something.

    Raises:
        NotPlain: nested too deeply.
    """
    if isinstance(value, str):
        return _text(value, notes)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -LARGEST <= value < LARGEST else float(value)
    if isinstance(value, float):
        return value if value - value == 0 else _noted(notes, NUMBER_NAMES)
    if depth > DEEPEST:
        raise NotPlain("nested too deeply")
    if isinstance(value, dict):
        return {_text(str(key), notes): plain(inner, notes, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, notes, depth + 1) for inner in value]
    return _rendered(value, notes)


def _text(text: str, notes: Counter[str]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        text, count = SURROGATE.subn("\ufffd", text)
        notes[SURROGATES] += count
    return text


def _noted(notes: Counter[str], what: str) -> None:
    notes[what] += 1


def _rendered(value: Any, notes: Counter[str]) -> str | None:
    """Values that tables have beside JSON's."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return _noted(notes, "binary values read as null")
