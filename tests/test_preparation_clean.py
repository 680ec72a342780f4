"""Repair of text: one normal form, nothing cut, every repair counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparation_rows import chat, outcome, text

from rlt.formats.record import message, texts_of
from rlt.preparation.clean import Clean, Cleaner

# Characters of which repairs are made: halves of pairs, mojibake, controls, blank lines, accents to compose.
AWKWARD = st.text(
    st.sampled_from("aé\u0301Ã©â€™œÂ \x80\x85\x9d\ud83d\ude00\r\n\t \x00\x1b[31m\ufeff\u2028\u200d\u200f\u0663ﬁＡ|<>")
)


@pytest.fixture(scope="module")
def cleaner():
    return Cleaner()


@given(st.one_of(AWKWARD, st.text(st.characters())))
def test_a_second_repair_changes_nothing_and_the_form_can_be_written(text):
    cleaner = Cleaner()
    once = cleaner(text)
    assert cleaner(once) == once
    once.encode()


@pytest.mark.parametrize(
    ("given", "repaired"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeffname,age", "name,age"),
        ("schÃ¶n, she said itâ€™s", "schön, she said it’s"),
        ("cafe\u0301", "café"),
        ("nul\x00 bell\x07 page\x0c del\x7f", "nul bell page del"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("half \ud83d of a pair", "half � of a pair"),
        ("\ud83d\ude00 in two escapes", "😀 in two escapes"),
        ("a" + "\n" * 100_000 + "b", "a\n\n\nb"),
        ("a\n \n\t\n\n\nb", "a\n\n\nb"),
        ("\u0301\u0302\u0303", "\u0301\u0302\u0303"),
        ("😀🎉👩\u200d💻", "😀🎉👩\u200d💻"),
        ("\u200fשלום\u200e می\u200cخواهم", "\u200fשלום\u200e می\u200cخواهم"),
        ("QUJD" * 1000, "QUJD" * 1000),
    ],
)
def test_repairs(cleaner, given, repaired):
    assert cleaner(given) == repaired


@pytest.mark.parametrize(
    "program",
    [
        'def f(x):\n\tif x:\n\t\treturn "“curly” ﬁ ＡＢＣ"\n\n\n    # aligned   with   spaces  \n',
        "<p>write &lt;b&gt; for &amp;lt;</p>\nbreak  \nhere",
        "&lt;b&gt; is <b>",
        "x = {'a': [1, 2]}  # naïve\n" * 3,
    ],
)
def test_programs_and_markup_stay_as_they_are(cleaner, program):
    assert cleaner(program) == program


def test_every_text_of_a_record_is_repaired_and_counted(tmp_path):
    call = {"id": "1", "name": "find", "arguments": {"query": "a\r\nb", "more": ["x\x00y", 3]}}
    turns = [message("user", "hi\r\n"), message("assistant", None, thinking="one\x00two", tool_calls=[call])]
    found = outcome(Clean, tmp_path, [chat(*turns, answer="4\x002")])
    assert sorted(texts_of(found.kept[0])) == ["42", "a\nb", "hi\n", "onetwo", "xy"]
    assert found.kept[0]["messages"][1]["tool_calls"][0]["arguments"] == {"query": "a\nb", "more": ["xy", 3]}
    assert found.counts.notes == {"controls_removed": 3, "texts_changed": 5, "records_changed": 1}


def test_a_record_that_is_empty_or_too_long_is_dropped_and_never_cut(tmp_path):
    records = [text("a" * 1_000_000), text("a" * 1_000_001), text(" \n\x00\ufeff"), chat("a" * 600_000, "b" * 500_000)]
    found = outcome(Clean, tmp_path, records)
    assert [len(record["text"]) for record in found.kept] == [1_000_000]
    assert found.reasons == ["too_long", "empty", "too_long"]


def test_marks_of_a_chat_template_inside_a_text_stay_text_and_are_counted(tmp_path):
    said = "Write <|im_end|> or <|end|> after [/INST], or <｜end▁of▁sentence｜>."
    found = outcome(Clean, tmp_path, [chat(said, "I <see>. a <| b |> c"), chat("no marks", "none")])
    assert found.kept[0]["messages"][0]["content"] == said
    assert found.counts.notes["records_with_special_tokens"] == 1


def test_lone_surrogates_are_counted():
    cleaner = Cleaner()
    cleaner("\ud83d\ude00 \ud83d \ude00")
    assert cleaner.counts["surrogates_replaced"] == 2
