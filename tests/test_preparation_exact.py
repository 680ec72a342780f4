"""Exact duplicates: against a dictionary of normal forms in plain Python, over any number of shards."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_alone import chat_record, run_alone, text_record

from rlt.errors import Refused
from rlt.formats.record import message
from rlt.preparation.exact import Exact
from rlt.preparation.normal import normal_forms, record_hashes


def plain(text: str) -> str:
    """The normal form as one line of Python."""
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return " ".join(lowered.split())


def forms(texts: list[str]) -> list[str]:
    return [bytes(form).decode() for form in normal_forms(texts)]


def ids(records: list[dict]) -> list[str]:
    return sorted(record["id"] for record in records)


ODD = " \t\n\r\x0b\x1fΣσİÅKTtJj\u0301\u0308\u030c\xa0\u2003\0"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ODD))))
def test_many_texts_at_once_have_the_normal_form_of_each_alone(texts):
    assert forms(texts) == [plain(text) for text in texts]


@given(st.text())
def test_a_normal_form_is_its_own_normal_form(text):
    assert forms(forms([text])) == forms([text])


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_the_first_of_equal_rows_is_kept_as_a_dictionary_keeps_it(tmp_path, tasks):
    generator = random.Random(0)
    spaces = [" ", "  ", "\n", "\t "]
    records = []
    for number in range(600):
        words = [
            "The",
            str(generator.randrange(40)),
            generator.choice(["Men", "men", "MEN"]),
            "caf\u00e9",
            "cafe\u0301",
        ]
        text = generator.choice(spaces).join(words[: 3 + number % 3])
        records.append(text_record(number // 2, text, source="ab"[number % 2]))
    first: dict[str, str] = {}
    for record in sorted(records, key=lambda record: (record["source"], int(record["id"].split(":")[1]))):
        first.setdefault(plain(record["text"]), record["id"])
    generator.shuffle(records)
    counts, kept, _ = run_alone(Exact, tmp_path, records, tasks)
    assert ids(kept) == sorted(first.values())
    assert counts.dropped == {"exact duplicate": 600 - len(first)}


def test_of_all_identical_rows_the_first_is_left_and_of_all_unique_ones_none_goes(tmp_path):
    same = [text_record(number, "One and the same.") for number in range(100)]
    _, kept, _ = run_alone(Exact, tmp_path, same, 3)
    assert [row["id"].split(":")[1] for row in kept] == ["0"]
    unique = [text_record(number, f"Row {number}.") for number in range(1000)]
    _, kept, _ = run_alone(Exact, tmp_path, unique, 3)
    assert len(kept) == 1000


def test_rows_without_a_letter_are_no_duplicates_of_one_another(tmp_path):
    rows = [
        text_record(0, ""),
        text_record(1, " \n"),
        text_record(2, "\t"),
        chat_record(3, ("user", "")),
        chat_record(4),
    ]
    _, kept, _ = run_alone(Exact, tmp_path, rows)
    assert ids(kept) == ids(rows)


def test_numbers_roles_tools_and_answers_make_a_difference_and_case_and_space_do_not():
    asked = ("user", "What is 2 + 2?"), ("assistant", "It is 4.")
    base = chat_record(0, *asked)
    same = chat_record(1, ("user", "what  is\n2 + 2?"), ("assistant", "IT IS 4."))
    other = [
        chat_record(2, ("user", "What is 2 + 3?"), asked[1]),
        chat_record(3, ("assistant", "What is 2 + 2?"), ("user", "It is 4.")),
        chat_record(4, *asked, answer="4"),
        chat_record(5, *asked, tools=[{"name": "add"}]),
        chat_record(6, ("user", "What is"), ("user", "2 + 2?"), asked[1]),
        text_record(7, "What is 2 + 2? It is 4."),
    ]
    first, second, *rest = record_hashes([base, same, *other])
    assert first == second
    assert len({first, *rest}) == 7


def test_the_order_of_a_calls_arguments_is_none():
    def calling(arguments: dict) -> dict:
        turn = message("assistant", None, tool_calls=[{"id": "1", "name": "f", "arguments": arguments}])
        return {**chat_record(0, ("user", "Go")), "messages": [turn]}

    one, other, third = calling({"a": "X", "b": 2}), calling({"b": 2, "a": "x"}), calling({"a": "x", "b": 3})
    hashes = record_hashes([one, other, third])
    assert hashes[0] == hashes[1] != hashes[2]


ANSWERS = [
    chat_record(0, ("user", "Why?"), ("assistant", "A")),
    chat_record(1, ("user", "why?"), ("assistant", "B")),
    chat_record(2, ("user", "Why? "), ("assistant", "a")),  # a copy of the first: counts for nothing
    chat_record(3, ("user", "Why?"), ("assistant", "C")),
    chat_record(4, ("user", "How?"), ("assistant", "A")),
    text_record(5, "Why?"),
    text_record(6, "Who?"),
]


@pytest.mark.parametrize(("same_prompt", "left"), [("keep_all", "013456"), ("keep_first", "0456"), (2, "01456")])
def test_of_one_prompt_so_many_different_answers_are_kept(tmp_path, same_prompt, left):
    _, kept, dropped = run_alone(Exact, tmp_path, ANSWERS, 2, same_prompt=same_prompt)
    assert "".join(sorted(row["id"].split(":")[1] for row in kept)) == left
    assert {row["reason"] for row in dropped} <= {"exact duplicate", "another answer to one prompt"}


@pytest.mark.parametrize("value", ["first", 0, -1, "keep_k"])
def test_another_policy_is_refused(tmp_path, value):
    with pytest.raises(Refused, match="same_prompt="):
        run_alone(Exact, tmp_path, ANSWERS, same_prompt=value)


def test_two_files_of_one_source_with_equal_row_numbers_are_told_apart(tmp_path):
    """A pipeline that names rows by their file's stem mistakes one for the other."""
    one, other = text_record(0, "x"), text_record(0, "y")
    one["id"], other["id"] = "a:0-7:1", "a:1-7:2"
    copies = [{**one, "id": "a:1-3:1"}, {**other, "id": "a:0-9:2"}]
    _, kept, _ = run_alone(Exact, tmp_path, [*copies, one, other])
    assert ids(kept) == ["a:0-7:1", "a:0-9:2"]
