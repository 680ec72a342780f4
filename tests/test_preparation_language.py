"""Language of a record: right for real sentences, silent about what is in no language."""

import importlib

import pytest
from preparation_rows import chat, outcome, text

from rlt.errors import Refused
from rlt.preparation.language import Detector, Language, prose_of

LARGE = [
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it"),
    *("ja", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "ta", "te", "tr", "uk", "vi", "zh"),
]
GERMAN = "Der Bahnhof ist gleich hinter der Kirche, und der Zug fährt um acht Uhr."
ENGLISH = "The station is right behind the church, and the train leaves at eight."


def test_97_of_100_example_sentences_in_large_languages_are_found():
    detector = Detector()
    found = [(language, detector(sentence)[0]) for language in LARGE for sentence in sentences(language)]
    assert len(found) > 200
    assert sum(a == b for a, b in found) / len(found) >= 0.96


def sentences(language: str) -> list[str]:
    return importlib.import_module(f"spacy.lang.{language}.examples").sentences


def test_other_languages_are_dropped_and_the_wanted_one_is_noted(tmp_path):
    found = outcome(Language, tmp_path, [text(ENGLISH), text(GERMAN), chat("Wo ist der Bahnhof?", GERMAN)])
    assert [record["meta"]["lang"] for record in found.kept] == ["en"]
    assert found.reasons == ["language", "language"]


def test_any_language_is_kept_where_none_is_named(tmp_path):
    found = outcome(Language, tmp_path, [text(ENGLISH), text(GERMAN)], languages=None)
    assert [record["meta"]["lang"] for record in found.kept] == ["en", "de"]


def test_a_text_is_read_to_its_end(tmp_path):
    """A library's default of 80 characters would judge this by its title."""
    found = outcome(Language, tmp_path, [text(f"{ENGLISH} {' '.join([GERMAN] * 30)}")], languages=["de"])
    assert [record["meta"]["lang"] for record in found.kept] == ["de"]


@pytest.mark.parametrize(
    "content",
    [
        "42",
        "x^2 + 2x + 1 = (x + 1)^2, so x = -1",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\nprint(gcd(12, 18))\n",
        "$\\int_0^1 \\frac{dx}{1+x^2} = \\frac{\\pi}{4}$",
        "😀🎉👍" * 20,
        "\u0301\u0302" * 50,
        "Ja.",
    ],
)
def test_what_is_in_no_language_is_kept_and_counted(tmp_path, content):
    found = outcome(Language, tmp_path, [text(content)])
    assert len(found.kept) == 1
    assert found.kept[0]["meta"]["lang"] is None
    assert found.counts.notes == {"undetermined": 1}


def test_code_in_an_answer_does_not_hide_its_language(tmp_path):
    program = "```python\ndef foo(bar):\n    return bar.replace('une', 'deux').encode('latin-1')\n```"
    found = outcome(Language, tmp_path, [chat("How do I replace a word in Python?", f"{program}\n{ENGLISH}")])
    assert [record["meta"]["lang"] for record in found.kept] == ["en"]
    assert "foo" not in (prose_of(f"{program}\n{ENGLISH}") or "")


def test_noise_is_dropped_as_uncertain(tmp_path):
    noise = "qwx zzkp vrrt mnbw plkj hgfd xcvb yuio asdf qwer zxcv tyui bnmp lkjh wq zx rtgh vbnm uiop fdsa"
    found = outcome(Language, tmp_path, [text(noise)])
    assert found.reasons[:1] in (["language_uncertain"], ["language"])


def test_a_language_is_named_by_its_code(tmp_path):
    with pytest.raises(Refused, match="'english' is none of af, als"):
        outcome(Language, tmp_path, [], languages=["english"])
