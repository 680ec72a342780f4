"""The names and types of every field of the trainers' configurations, and the values of some, as a committed table.

The plan checks overrides against `trl_fields.json`, because importing TRL to ask it takes seconds. After an upgrade:

    python -m trainers.field_table
"""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from rlt.schema import profile_of, settings_of

TABLE = Path(__file__).with_name("trl_fields.json")


def base_names(annotation) -> list[str]:
    """The names of plain types that an annotation admits: `list[int] | None` gives ["NoneType", "list"]."""
    arguments = getattr(annotation, "__args__", None)
    origin = getattr(annotation, "__origin__", None)
    if arguments and (origin is None or not isinstance(origin, type)):
        return sorted({name for argument in arguments for name in base_names(argument)})
    kind = origin or annotation
    name = getattr(kind, "__name__", str(kind))
    return [name if name in ("int", "float", "str", "bool", "NoneType", "list", "dict") else "str"]


def fields_of(cls: type) -> dict[str, list[str]]:
    """{field: admitted types} of a dataclass's init fields."""
    hints = get_type_hints(cls)
    return {field.name: base_names(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def typed_settings(config: dict[str, Any]) -> Any:
    """The settings of a flat configuration whose keys were checked, as its profile's class (`rlt.schema.settings_of`).

    Raises:
        Refused: the configuration lacks a key.
    """
    return settings_of(config, read_table().get(profile_of(config).config or "", ()))


@cache
def read_table() -> dict[str, dict[str, list[str]]]:
    """{`Profile.config`: {field: admitted types}}, and under "choices" {field: admitted values}."""
    return json.loads(TABLE.read_text(encoding="utf-8"))
