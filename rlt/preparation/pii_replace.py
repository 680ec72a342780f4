"""What stands in the place of a value: a numbered tag, or a made-up value of the same kind."""

import re
from hashlib import sha256
from typing import Any

from rlt.preparation.pii_patterns import Span

STYLES = ("tag", "surrogate")
ALWAYS_TAGGED = ("secret", "crypto", "url_credentials")  # a made-up key would teach to make up keys
DIGITS = ("phone", "credit_card", "us_ssn")


class Replacements:
    """Of one record: the same value gets the same replacement in all of its texts."""

    def __init__(self, surrogates: "Surrogates | None"):
        self.surrogates = surrogates
        self.given: dict[tuple[str, str], str] = {}
        self.numbers: dict[str, int] = {}

    def __call__(self, entity: str, value: str) -> str:
        key = entity, normal_form(entity, value)
        if key not in self.given:
            self.numbers[entity] = self.numbers.get(entity, 0) + 1
            made = self.surrogates and entity not in ALWAYS_TAGGED and self.surrogates(*key)
            self.given[key] = made or f"<{entity.upper()}_{self.numbers[entity]}>"
        return self.given[key]


def normal_form(entity: str, value: str) -> str:
    """Two writings of one value are one."""
    if entity in DIGITS:
        return re.sub(r"\D", "", value)
    return re.sub(r"[\s-]", "", value).upper() if entity == "iban" else value.lower() if entity == "email" else value


class Surrogates:
    """Values that Faker makes up, the same for the same value in all records of a run; no way leads back.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        from faker import Faker

        self.seed, self.fake = seed, Faker("en_US")

    def __call__(self, entity: str, value: str) -> str:
        self.fake.seed_instance(int.from_bytes(sha256(f"{self.seed}:{entity}:{value}".encode()).digest()[:8]))
        makers: dict[str, Any] = {
            "email": self.fake.email,
            "phone": lambda: self.fake.numerify("+1 %##-555-01##"),
            "credit_card": self.fake.credit_card_number,
            "iban": self.fake.iban,
            "us_ssn": self.fake.ssn,
            "ip": self.fake.ipv4_public,
            "name": self.fake.name,
            "place": self.fake.city,
        }
        return makers[entity]()


def replaced(text: str, spans: list[Span], replace: Replacements, flat: str) -> str:
    """The text with every span replaced; spans do not overlap, and are in order."""
    parts, end = [], 0
    for span in spans:
        parts += [text[end : span.start], replace(span.entity, flat[span.start : span.end])]
        end = span.end
    return "".join((*parts, text[end:]))
