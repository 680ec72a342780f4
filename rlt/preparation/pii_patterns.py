"""Where personal data and secrets stand in a text: one finder for each entity.

Presidio's recognisers find addresses of e-mail, cards (Luhn), IBANs (mod 97), US social security numbers, wallets and
telephone numbers, asked one by one, so that no language model is needed; each only where a cheap pattern has seen a
candidate. Network addresses, credentials in addresses and secrets have rules of our own.

Not enabled, since they match any number or address: bank accounts, licences, passports, NHS numbers, dates, plain URLs.
"""

import ipaddress
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

# Stronger ones first: of two that overlap, the first is replaced.
ENTITIES = ("url_credentials", "secret", "email", "iban", "credit_card", "us_ssn", "crypto", "phone", "ip")
ANYWHERE = ("url_credentials", "secret", "email")  # in mathematics and code too, where a number is no telephone's
NAMES = {"PERSON": "name", "PER": "name", "GPE": "place", "LOC": "place"}  # labels of spaCy's models

LEAST_SCORE = 0.5  # of Presidio
# No operand of a sum: every tenth number of that length passes for a card.
AT = re.compile(r"(?<=[^\s@])@(?=([\w.-]{1,253}\.\w[\w-]*))")
LOCAL = 64  # characters before the @, at most (RFC 5321)
CARD = re.compile(r"(?<![\w.,])(?<![-+*/^×÷=] )(?<![+*/^×÷])\d(?:[ -]?\d){11,18}(?!\w|[.,]\d| ?[+*/^×÷=]| - ?\d)")
# Numbers as issuers have them, of 12 to 19 digits; what Presidio has by itself knows neither Mastercard's second series
# nor the shortest and longest ones. It does Luhn's check.
ISSUED = (
    r"\b(?:[3-6](?:[ -]?\d){12,18}|2[2-7](?:[ -]?\d){14}|5[0678](?:[ -]?\d){10}|6(?:[ -]?\d){11}"
    r"|(?:1800|2131)(?:[ -]?\d){11})\b"
)
IBAN = re.compile(r"[A-Z]{2}\d{2}[ -]?[A-Z0-9]{4}")
SSN = re.compile(r"(?<![\w.-])\d{3}([- .])\d{2}\1\d{4}(?![\w-]|\.\d)")
WALLET = re.compile(r"(?<![A-Za-z0-9])(?:bc1|[13])[a-zA-HJ-NP-Z0-9]{25,59}(?![A-Za-z0-9])")
CREDENTIALS = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://([^\s/:@<>{}$%'\"]*:[^\s/@<>{}$'\"]+)@(?=[\w\[])", re.IGNORECASE)
SECRET = re.compile(
    r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:"  # whole, or cut off
    r".{0,20000}?-----END (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|(?:(?:\\[nr]|\s){0,4}[A-Za-z0-9+/=]{40,})+)"
    r"|(?<![A-Za-z0-9_])(?:(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{50,250}|glpat-[\w-]{20,64}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web token
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}|AIza[\w-]{35}|sk-(?:proj-|ant-[a-z0-9]+-|svcacct-)?[A-Za-z0-9_-]{32,200}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}"
    r"|SG\.[\w-]{22}\.[\w-]{43}|dop_v1_[a-f0-9]{64})(?![A-Za-z0-9])"
    r"|(?i:aws_secret_access_key|secretaccesskey)[\"']?\s*[:=]\s*[\"']?(?P<value>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    re.DOTALL,
)
SECRET_SIGNS = (
    *("PRIVATE KEY", "AKIA", "ASIA", "ABIA", "ACCA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("eyJ", "xox", "AIza", "sk-", "k_live_", "k_test_", "hf_", "npm_", "pypi-", "SG.", "dop_v1_"),
    *("ecret_access_key", "ECRET_ACCESS_KEY", "ecretAccessKey"),
)
IP4 = re.compile(r"(?<![\w.-])(?<!\w/)\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)")
IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
VERSION = re.compile(
    r"\b(?:versions?|v|ver|release|build|rev|revision|firmware|update|section|chapter|oid)\.?\s*[:=#]?\s*\Z",
    re.IGNORECASE,
)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
PHONE = re.compile(
    r"(?<![\w.,/=)^*-])(?:\(?\+(?=[1-9])|\((?!\+))?\d(?:[ ().\-/]{0,2}\d){6,16}"
    r"(?: ?(?:x|ext\.?) ?\d{1,5})?(?![\w%]|[.,]\d)"
)
ABOUT_PHONES = re.compile(
    r"\b(?:tele)?(?:phones?|fax)\b|\b(?:tel|cell|mobile|call|dial|ring|whatsapp|sms|text|hotline|contact|reach|telefon|handy"
    r"|appelez|llame|móvil)\b|☎|📞",
    re.IGNORECASE,
)
KEPT = 2**14  # numbers whose verdict is remembered
CONTEXT = 60  # characters before a number in which something says that it is a telephone's
# A date, a span of years, a short number without any space.
NO_PHONE = re.compile(
    r"(?:19|20)\d\d[-/.](?:0\d|1[0-2])[-/.][0-3]\d|[0-3]?\d[-/.][0-3]?\d[-/.](?:19|20)\d\d"
    r"|(?:19|20)\d\d ?- ?(?:19|20)\d\d\Z|\d{7,9}\Z"
)


@dataclass(frozen=True, order=True)
class Span:
    """Characters `start` to `end` of a text are an entity's."""

    start: int
    end: int
    entity: str


Finder = Callable[[str, str], Iterator[tuple[int, int]]]  # of a flattened text, and of what stood before it


@cache
def _flat() -> dict[int, str]:
    """Characters that are read as another one, each for one: digits of any script, wide @ and dots, dashes, spaces."""
    table = {ord(one): "@" for one in "＠﹫"} | {ord(one): "." for one in "．。․"} | {ord("＋"): "+"}
    table |= dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFF0D), "-")
    table |= dict.fromkeys((0xA0, 0x202F, 0x3000, *range(0x2000, 0x200B)), " ")
    for code in range(0x80, 0x1FBFA):
        if (digit := unicodedata.decimal(chr(code), None)) is not None:
            table[code] = str(digit)
    return table


def flattened(text: str) -> str:
    """As finders read it; as long as the text, so that places are the same."""
    return text if text.isascii() else text.translate(_flat())


def recognisers(entities: tuple[str, ...]) -> dict[str, Finder]:
    """The finder of each entity.

    Args:
        entities: of `ENTITIES`.
    """
    from presidio_analyzer import Pattern
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        CryptoRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        PhoneRecognizer,
        UsSsnRecognizer,
    )
    from tldextract import TLDExtract

    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL)  # it logs values that it cannot validate
    known = TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list inside the package: nothing is fetched

    class Email(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(known(pattern_text.rpartition("@")[2]).fqdn)

    made: dict[str, Callable[[], Finder]] = {
        "url_credentials": lambda: credentials,
        "secret": lambda: secrets,
        "email": lambda: emails(Email()),
        "iban": lambda: by_presidio(IbanRecognizer(), IBAN),
        "credit_card": lambda: by_presidio(CreditCardRecognizer([Pattern("card", ISSUED, 0.3)]), CARD, within=True),
        "us_ssn": lambda: by_presidio(UsSsnRecognizer(), SSN, within=True),
        "crypto": lambda: by_presidio(CryptoRecognizer(), WALLET, within=True),
        "phone": lambda: phones(PhoneRecognizer(leniency=0)),
        "ip": lambda: addresses,
    }
    return {entity: made[entity]() for entity in ENTITIES if entity in entities}


def by_presidio(recogniser: Any, candidate: re.Pattern, within: bool = False) -> Finder:
    """What a recogniser finds with enough certainty, if the text has a candidate at all.

    Args:
        within: it is shown each candidate alone.
    """

    def found(text: str) -> Iterator[tuple[int, int]]:
        for result in recogniser.analyze(text, recogniser.supported_entities):
            if result.score >= LEAST_SCORE:
                yield result.start, result.end

    def find(text: str, before: str) -> Iterator[tuple[int, int]]:
        if within:
            for match in candidate.finditer(text):
                yield from ((match.start() + start, match.start() + end) for start, end in found(match[0]))
        elif candidate.search(text):
            yield from found(text)

    return find


def emails(recogniser: Any) -> Finder:
    """Presidio's pattern on what stands around each @, as it would take a square of time on a blob without spaces."""

    def find(text: str, before: str) -> Iterator[tuple[int, int]]:
        end = 0
        for match in AT.finditer(text):
            start, end = max(end, match.start() - LOCAL), match.end(1)
            for result in recogniser.analyze(text[start:end], recogniser.supported_entities):
                if result.score >= LEAST_SCORE:
                    yield start + result.start, start + result.end

    return find


def phones(recogniser: Any) -> Finder:
    """Numbers that begin with +, or stand shortly after a word about telephones; all of them possible numbers."""

    @lru_cache(KEPT)
    def is_possible(number: str) -> bool:
        return bool(recogniser.analyze(number, recogniser.supported_entities))

    def find(text: str, before: str) -> Iterator[tuple[int, int]]:
        for match in PHONE.finditer(text):
            lead = f"{before}\n{text[max(0, match.start() - CONTEXT) : match.start()]}"[-CONTEXT:]
            if "+" not in match[0][:2] and not ABOUT_PHONES.search(lead) or NO_PHONE.match(match[0]):
                continue
            if is_possible(match[0]):
                yield match.span()

    return find


def credentials(text: str, before: str) -> Iterator[tuple[int, int]]:
    """`user:password` of `scheme://user:password@host`."""
    if "://" in text:
        yield from (match.span(1) for match in CREDENTIALS.finditer(text))


def secrets(text: str, before: str) -> Iterator[tuple[int, int]]:
    """Private keys and tokens whose issuers mark them."""
    if any(sign in text for sign in SECRET_SIGNS):
        yield from (match.span("value") if match["value"] else match.span() for match in SECRET.finditer(text))


def addresses(text: str, before: str) -> Iterator[tuple[int, int]]:
    """Addresses of the public network. Four single digits are a version or a chapter."""
    for match in IP4.finditer(text):
        is_version = VERSION.search(text[max(0, match.start() - 20) : match.start()])
        if any(len(part) > 1 for part in match[0].split(".")) and not is_version and _is_global(match[0]):
            yield match.span()
    if "::" in text or text.count(":") > 6:
        yield from (match.span() for match in IP6.finditer(text) if _is_global(match[0]))


def _is_global(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6 and "::" in text and address not in GLOBAL_UNICAST:
        return False  # `a::b` of a program
    return address.is_global
