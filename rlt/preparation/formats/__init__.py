"""Every format: one function from a source's row to a record, in one table; nothing is guessed, nothing made up."""

from collections.abc import Callable
from typing import Any

from rlt.preparation.record import Dropped, Record

Format = Callable[[dict[str, Any]], Record | Dropped]
FORMATS: dict[str, Format] = {}
