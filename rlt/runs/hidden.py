"""What of a configuration is not shown: the values of keys that hold secrets, at any depth, and what stands before the
@ of an address."""

import re
from collections.abc import Iterator
from typing import Any

ENDINGS = ("hub_token", "auth_token", "access_token", "password", "secret", "api_key", "secret_key", "access_key")
NAMES = ("token", "authorization", "passwd")
HIDDEN = "<hidden>"
# Inside a value, as Hydra reads it: `{headers: {token: ...}}`.
INNER_KEY = re.compile(rf"(?:\b(?:{'|'.join(NAMES)})|\w*(?:{'|'.join(ENDINGS)}))['\"]?\s*:", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password of an address


def holds_secret(key: str) -> bool:
    """Whether a key's value is not shown, by its name."""
    return key.lower().endswith(ENDINGS) or key.lower() in NAMES


def is_secret(argument: str) -> bool:
    """Whether an override, `key=value`, has something in it that is not shown."""
    key, _, value = argument.lstrip("+").partition("=")
    return holds_secret(key) or bool(INNER_KEY.search(value) or LOGIN.search(value))


def hide_secrets(value: Any, key: str = "") -> Any:
    """What may be printed and written of a configuration, of a stage's settings in it, or of one value."""
    if value and holds_secret(key):
        return HIDDEN
    if isinstance(value, dict):
        return {name: hide_secrets(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [hide_secrets(inner) for inner in value]
    return LOGIN.sub(HIDDEN, value) if isinstance(value, str) else value


def secrets_in(value: Any, place: str) -> Iterator[str]:
    """Where below a key a secret stands: `dataset_kwargs.headers.token`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from (
                [f"{place}.{name}"] if inner and holds_secret(str(name)) else secrets_in(inner, f"{place}.{name}")
            )
    elif isinstance(value, list):
        for inner in value:
            yield from secrets_in(inner, place)
    elif isinstance(value, str) and LOGIN.search(value):
        yield place
