"""Personal data: what is found, what is left alone, and what stands in its place."""

import logging
import random
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import spacy
from faker import Faker
from hypothesis import given, settings
from hypothesis import strategies as st
from preparation_rows import chat, outcome, text

from rlt.errors import Refused
from rlt.formats.record import message, texts_of
from rlt.preparation.domain import MATHS, PROSE, domain_of, domain_of_text
from rlt.preparation.pii import Finder, Pii
from rlt.preparation.pii_patterns import ENTITIES, flattened

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"
CUT = "-----BEGIN PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA" * 5
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


@pytest.fixture(scope="module")
def finder():
    return Finder(ENTITIES)


def found(finder: Finder, content: str, prose: bool = True) -> list[tuple[str, str]]:
    return [(s.entity, content[s.start : s.end]) for s in finder(flattened(content), prose=prose)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Write to Ann.Lee+x@mail.example.co.uk today.", ("email", "Ann.Lee+x@mail.example.co.uk")),
        ("ssh root@build.example.org -p 22", ("email", "root@build.example.org")),
        ("Mail ann＠example.com please", ("email", "ann＠example.com")),
        ("My card is 4111111111111111.", ("credit_card", "4111111111111111")),
        ("My card is 4111 1111 1111 1111.", ("credit_card", "4111 1111 1111 1111")),
        ("Card ４１１１１１１１１１１１１１１１ there", ("credit_card", "４１１１１１１１１１１１１１１１")),
        ("Pay to GB29 NWBK 6016 1331 9268 19 now", ("iban", "GB29 NWBK 6016 1331 9268 19")),
        ("SSN 536-22-8726", ("us_ssn", "536-22-8726")),
        ("Send it to 1BoatSLRHtKNngkdXEeobR76b53LETtpyT", ("crypto", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT")),
        ("Call me at 212-555-0143 tonight", ("phone", "212-555-0143")),
        ("My phone number is (212) 555-0143 x12.", ("phone", "(212) 555-0143 x12")),
        ("From abroad: +44 20 7946 0958", ("phone", "+44 20 7946 0958")),
        ("tel. ٠١٢٣٤٥٦٧٨٩٠", ("phone", "٠١٢٣٤٥٦٧٨٩٠")),
        ("The visitor came from 93.184.216.34, at night.", ("ip", "93.184.216.34")),
        ("http://93.184.216.34/index.html", ("ip", "93.184.216.34")),
        ("from 2606:2800:220:1:248:1893:25c8:1946 to", ("ip", "2606:2800:220:1:248:1893:25c8:1946")),
        ("postgres://ann:s3cret@db.example.org/x", ("url_credentials", "ann:s3cret")),
        ("key AKIAIOSFODNN7EXAMPLE in", ("secret", "AKIAIOSFODNN7EXAMPLE")),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
         ("secret", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")),
        (f"token {'ghp_' + 'a1B2' * 9}", ("secret", "ghp_" + "a1B2" * 9)),
        (f"Bearer {TOKEN}", ("secret", TOKEN)),
        (f"here:\n{KEY}\n", ("secret", KEY)),
        (f"cut off: {CUT} ...", ("secret", CUT)),
    ],
)  # fmt: skip
def test_what_is_found(finder, content, expected):
    assert found(finder, content) == [expected]


@pytest.mark.parametrize(
    "content",
    [
        "Upgrade to version 1.2.3.4 today, or v10.20.30.40, Chrome/91.0.4472.124 or release 93.184.216.34.",
        "Section 1.2.3.4 says so; OID 1.3.6.1.4.1.311.21.20 too.",
        "The gateways are 10.0.0.1, 192.168.1.254, 127.0.0.1, ::1 and fe80::1.",
        "std::vector<a::b> and at 12:30:45:00 sharp",
        "ISBN 978-3-16-148410-0 and ISBN 3-16-148410-0",
        "Order number 4829105736 arrives on 2024-11-28, call of 2024-01-15.",
        "My card is 4111111111111112.",
        "Pay to GB28 NWBK 6016 1331 9268 19 now",
        "The sample number 078-05-1120 was printed in wallets.",
        "@property\ndef x(self): return self.a @ self.b.c",
        "x = 5551234567, and 123-45-6789 + 4111111111111111 is large",
        "pi is 3.14159265358979323846 and e is 2.718281828459045",
        "commit 4e1243bd22c66e76c2ba9eddc1f91394e57f9f83, uuid 123e4567-e89b-12d3-a456-426614174000",
        "postgres://{user}:{password}@host, https://example.com:8080/@ann, mailto:nobody@localhost",
        "QUJDMTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkw" * 20,
        "The line -----BEGIN PRIVATE KEY----- begins a key, and it goes on with its body.",
        "sk-learn is not a key, AKIA neither, eyJ too",
    ],
)  # fmt: skip
def test_what_is_left_alone(finder, content):
    prose = "123-45-6789 + " not in content
    assert found(finder, content, prose) == []


def test_many_values_in_one_place_are_all_found(finder):
    values = [f"a{n}@b.co" for n in range(300)]
    for separator in (",", " ", "; "):
        assert found(finder, separator.join(values)) == [("email", value) for value in values]


def recall(finder: Finder, entity: str, template: str, values: list[str]) -> float:
    hits = [(entity, value) in found(finder, template.format(value)) for value in values]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(
    ("entity", "locale", "provider", "template", "least"),
    [
        ("email", "en_US", "email", "You can write to {} about it.", 1.0),
        ("iban", "en_GB", "iban", "The account is {} at our bank.", 1.0),
        ("us_ssn", "en_US", "ssn", "Her number is {} as it says.", 1.0),
        ("ip", "en_US", "ipv4_public", "The request came from {} at noon.", 1.0),
        ("credit_card", "en_US", "credit_card_number", "I paid with {} last week.", 0.95),
        ("phone", "en_US", "phone_number", "Please call me at {} tonight.", 0.95),
        ("phone", "en_GB", "phone_number", "Please call me at {} tonight.", 0.95),
    ],
)
def test_made_up_values_of_faker_are_found(finder, entity, locale, provider, template, least):
    fake = Faker(locale)
    fake.seed_instance(0)
    share = recall(finder, entity, template, [getattr(fake, provider)() for _ in range(1000)])
    assert share >= least


def test_global_addresses_of_version_6_are_found(finder):
    fake = Faker()
    fake.seed_instance(0)
    values = [value for value in (fake.ipv6() for _ in range(200)) if value[0] in "23"]
    assert len(values) > 10
    assert recall(finder, "ip", "The request came from {} at noon.", values) == 1.0


MATHS_SETS = (
    *(
        "chain_sum",
        "basic_arithmetic",
        "products",
        "simple_equations",
        "polynomial_multiplication",
        "gsm_symbolic",
        "lcm",
    ),
    *("leg_counting", "fraction_simplification", "decimal_arithmetic", "calendar_arithmetic", "number_format"),
    *("complex_arithmetic", "prime_factorization", "power_function", "bitwise_arithmetic"),
)


def test_mathematics_stays_as_it_is(tmp_path):
    """As a question with its answer, and as a text."""
    import reasoning_gym

    records = []
    for name in MATHS_SETS:
        options = {"min_digits": 6, "max_digits": 12} if name == "chain_sum" else {}
        for row in reasoning_gym.create_dataset(name, seed=0, size=50, **options):
            records.append(chat(message("user", row["question"]), kind="rl", answer=str(row["answer"])))
            records.append(text(f"{row['question']}\nAnswer: {row['answer']}"))
    found = outcome(Pii, tmp_path, records)
    assert (found.kept, found.counts.notes) == (records, {})


def test_nothing_is_found_in_arithmetic_of_large_numbers(finder):
    rng = random.Random(0)
    sums = []
    for _ in range(1500):
        a, b = rng.randrange(10**10), rng.randrange(10**16)
        sums.append(f"{a} + {b} = {a + b}, and {a} - {b} = {a - b}; x = {rng.randrange(10**10)}.")
    content = "\n".join(sums)
    assert domain_of_text(content) == MATHS
    assert found(finder, content, prose=False) == []


def test_hardly_anything_but_written_addresses_is_found_in_programs(finder):
    """At most five in a megabyte of the standard library, beside the addresses that its authors left in comments."""
    contents = [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    hits = Counter(hit for content in contents for hit in found(finder, content, prose=False))
    address = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)*\.(com|org|net|edu|nz|de|uk|us|at|ca|fi|au|se)")
    written = {hit for hit in hits if address.fullmatch(hit[1])}
    assert sum(count for hit, count in hits.items() if hit not in written) <= 5 * sum(map(len, contents)) / 1e6, hits


def test_the_same_value_gets_the_same_tag_in_every_turn_and_inside_arguments(tmp_path):
    call = {"id": "1", "name": "save", "arguments": {"phone": "212-555-0143", "to": ["Ann@Example.com", 3]}}
    record = chat(
        message("user", "I am ann@example.com, my friend is bo@example.com."),
        message("assistant", None, thinking="bo@example.com it is", tool_calls=[call]),
        message("tool", '{"saved": "ann@example.com"}', tool_call_id="1"),
        message("assistant", "Saved 212-555-0143 for ann@example.com."),
    )
    result = outcome(Pii, tmp_path, [record])
    turns = result.kept[0]["messages"]
    assert turns[0]["content"] == "I am <EMAIL_1>, my friend is <EMAIL_2>."
    assert turns[1]["thinking"] == "<EMAIL_2> it is"
    assert turns[1]["tool_calls"][0]["arguments"] == {"phone": "<PHONE_1>", "to": ["<EMAIL_1>", 3]}
    assert turns[2]["content"] == '{"saved": "<EMAIL_1>"}'
    assert turns[3]["content"] == "Saved <PHONE_1> for <EMAIL_1>."
    assert result.counts.notes == {"email": 6, "phone": 2, "records_changed": 1}


def test_the_turn_before_says_what_a_number_is(tmp_path):
    asked = chat("Book a table.", "What is your phone number?", "212-555-0143", "Thank you.")
    bare = chat("Book a table.", "Which table?", "212-555-0143", "Thank you.")
    result = outcome(Pii, tmp_path, [asked, bare])
    assert [record["messages"][2]["content"] for record in result.kept] == ["<PHONE_1>", "212-555-0143"]


def test_a_value_whose_halves_stand_in_two_turns_is_not_seen(tmp_path):
    record = chat("My card is 4111 1111", "And the rest?", "1111 1111, and mail ann@exam", "Go on.", "ple.com", "Yes.")
    assert outcome(Pii, tmp_path, [record]).kept == [record]


def test_numbers_in_mathematics_and_code_stay_and_secrets_do_not(tmp_path):
    sums = "Call a = 212-555-0143. Then x = 3, y = 4 and x + y = 7. Mail ann@example.com."
    program = f"import os\nphone = '+1 212-555-0143'\nkey = '{'ghp_' + 'a1B2' * 9}'\nprint(phone)\n"
    result = outcome(Pii, tmp_path, [text(sums), text(program), text("Call 212-555-0143.", kind="maths")])
    assert result.kept[0]["text"] == sums.replace("ann@example.com", "<EMAIL_1>")
    assert result.kept[1]["text"] == program.replace("ghp_" + "a1B2" * 9, "<SECRET_1>")
    assert result.kept[2]["text"] == "Call 212-555-0143."


PIECES = st.sampled_from(
    [
        *("ann@example.com", "a@b.co", "+44 20 7946 0958", "call 212-555-0143", "4111 1111 1111 1111", "536-22-8726"),
        *("93.184.216.34", "GB29NWBK60161331926819", "https://ann:pw@x.org", "<EMAIL_1>"),
        *(" ", ", ", "@", ".", "-", "1", "\n", "é", "＠", "x", ":", "="),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=3))
def test_nothing_is_left_to_find(turns):
    stage = STAGE[0]
    record = chat(*turns)
    changed = stage.one(record)
    before = ""
    for content in texts_of(changed):
        flat = flattened(content)
        assert stage.finder(flat, before, domain_of(record) == PROSE) == []
        before = flat[-60:]


STAGE: list[Pii] = []


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    from preparation import settings_of

    made = Pii(settings_of(tmp_path_factory.mktemp("out"), []))
    made.start(None)  # pyrefly: ignore
    STAGE.append(made)


def test_made_up_values_are_the_same_for_the_same_value_and_no_keys(tmp_path):
    said = f"I am ann@example.com, call +1 212-555-0143, key {'ghp_' + 'a1B2' * 9}."
    records = [chat(said, "Hello ann@example.com."), chat("Mail ann@example.com.", "Done.")]
    first, second = (outcome(Pii, tmp_path, records, pii_style="surrogate").kept for _ in range(2))
    other = outcome(Pii, tmp_path, records, pii_style="surrogate", seed=7).kept
    assert first == second
    assert first != other
    made = re.findall(r"[\w.]+@[\w.-]+\w", "\n".join(content for record in first for content in texts_of(record)))
    assert len(set(made)) == 1 and len(made) == 3 and "ann@example.com" not in made
    assert "<SECRET_1>" in first[0]["messages"][0]["content"]
    assert "212-555-0143" not in first[0]["messages"][0]["content"]


def test_only_the_entities_that_are_asked_for_are_replaced(tmp_path):
    both = text("Mail ann@example.com from 93.184.216.34.")
    found = outcome(Pii, tmp_path, [both], pii_entities=["ip"])
    assert found.kept[0]["text"] == "Mail ann@example.com from <IP_1>."


def test_no_value_reaches_a_log_or_a_count(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    values = ["ann@example.com", "GB29 NWBK 6016 1331 9268 19", "DE89 3704 0044 0532 0130 0! x", "4111 1111 1111 1111"]
    found = outcome(Pii, tmp_path, [text(f"Here is {value} for you, DE12 ABCD ÄÖÜ.") for value in values])
    logged = caplog.text + str(found.counts.as_dict())
    assert all(value not in logged and value.replace(" ", "") not in logged for value in values)
    assert "NWBK" not in logged


def test_names_are_found_with_a_model_from_a_folder(tmp_path):
    model = spacy.blank("en")
    rules = model.add_pipe("entity_ruler")
    rules.add_patterns([{"label": "PERSON", "pattern": "Ann Lee"}, {"label": "GPE", "pattern": "Bern"},
                        {"label": "ORG", "pattern": "Acme"}])  # fmt: skip
    model.to_disk(tmp_path / "model")
    record = chat("Ann Lee of Acme lives in Bern.", "I know Ann Lee.")
    found = outcome(Pii, tmp_path, [record], pii_names=str(tmp_path / "model"))
    assert [turn["content"] for turn in found.kept[0]["messages"]] == [
        "<NAME_1> of Acme lives in <PLACE_1>.",
        "I know <NAME_1>.",
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pii_entities", ["passport"], "pii_entities: 'passport' does not exist: use some of"),
        ("pii_style", "mask", "pii_style=mask: use one of tag, surrogate"),
        ("pii_names", "en_no_such_model", "neither the folder of a spaCy model nor an installed package"),
        ("pii_names", "/no/such/folder", "neither the folder of a spaCy model nor an installed package"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, key, value, said):
    with pytest.raises(Refused, match=said):
        outcome(Pii, tmp_path, [], **{key: value})


@pytest.mark.parametrize(
    ("package", "changed", "said"),
    [
        ("faker", {"pii_style": "surrogate"}, "pii_style=surrogate needs the package faker: ./setup.sh data test"),
        ("presidio_analyzer", {}, "needs the package presidio_analyzer: ./setup.sh data"),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, package, changed, said):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refused, match=said):
        outcome(Pii, tmp_path, [], **changed)


def test_checking_imports_neither_presidio_nor_spacy():
    heavy = "{'presidio_analyzer', 'spacy', 'sklearn', 'torch', 'datatrove.pipeline', 'faker', 'ftfy'}"
    stages = "from rlt.preparation import clean, language, pii, quality, toxicity"
    program = f"import sys; {stages}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
