"""The split: by group, by a hash that nothing else moves."""

import pytest
from preparation import kept, run, settings_of, write_rows
from stage_alone import chat_record, run_alone, text_record

from rlt.errors import Refused
from rlt.preparation.split import Split


def split_of(rows: list[dict]) -> dict[str, str]:
    return {row["id"]: row["meta"]["split"] for row in rows}


def grouped(count: int, of_each: int) -> list[dict]:
    return [text_record(n, f"{n}", meta={"group": f"problem {n // of_each}"}) for n in range(count)]


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(Refused, match="validation_share=1 holds every row out"):
        Split(settings_of(tmp_path, ["a.jsonl"], validation_share=1.0)).check()


def test_rows_of_one_group_stand_on_one_side_and_the_share_is_near_what_was_asked(tmp_path):
    _, kept, _ = run_alone(Split, tmp_path, grouped(8000, 4), 3, validation_share=0.1)
    by_group: dict[str, set[str]] = {}
    for row in kept:
        by_group.setdefault(row["meta"]["group"], set()).add(row["meta"]["split"])
    assert all(len(sides) == 1 for sides in by_group.values())
    held = sum(row["meta"]["split"] == "validation" for row in kept)
    assert abs(held / 8000 - 0.1) < 3 * (0.1 * 0.9 / 2000) ** 0.5  # three standard errors of 2,000 groups


def test_more_rows_and_another_order_move_no_row(tmp_path):
    rows = grouped(400, 4)
    _, before, _ = run_alone(Split, tmp_path, rows, 1, validation_share=0.2)
    _, after, _ = run_alone(Split, tmp_path, [*grouped(2000, 4)[400:], *rows[::-1]], 5, validation_share=0.2)
    assert split_of(before).items() <= split_of(after).items()


def test_a_larger_share_only_adds_to_what_is_held_out(tmp_path):
    sides = []
    for share in (0.0, 0.1, 0.3):
        _, kept, _ = run_alone(Split, tmp_path, grouped(400, 1), 1, validation_share=share)
        sides.append({row["id"] for row in kept if row["meta"]["split"] == "validation"})
    assert sides[0] == set() and sides[1] < sides[2]


def answers(questions: int, of_each: int) -> list[dict[str, str]]:
    asked = [f"How much is {n} and {n * n}?" for n in range(questions)]
    return [{"question": q, "solution": f"Way {way}: add them."} for way in range(of_each) for q in asked]


def sides_of(folder, rows: list[dict[str, str]]) -> dict[str, set[str]]:
    """By question: where its rows are after reading and splitting."""
    settings = settings_of(folder / "out", [write_rows(folder / "rows.jsonl", rows)], validation_share=0.3)
    sides: dict[str, set[str]] = {}
    for row in kept(run(settings)["split"]):
        assert "group" not in row["meta"]
        sides.setdefault(row["messages"][0]["content"], set()).add(row["meta"]["split"])
    return sides


def test_answers_to_one_question_are_never_on_both_sides_and_a_row_in_front_moves_none(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    rows = answers(50, 4)
    sides = sides_of(tmp_path / "a", rows)
    assert len(sides) == 50 and {"train"} in sides.values() and {"validation"} in sides.values()
    assert all(len(one) == 1 for one in sides.values())
    more = sides_of(tmp_path / "b", [{"question": "Is one prime?", "solution": "No."}, *rows])
    assert sides.items() <= more.items() and len(more) == 51


def test_what_decides_is_the_normal_form_of_the_group_else_of_the_question_else_of_the_text(tmp_path):
    def sides(*records: dict) -> set[str]:
        _, found, _ = run_alone(Split, tmp_path, list(records), validation_share=0.5)
        return {row["meta"]["split"] for row in found}

    for n in range(20):
        asked = f"What is {n} squared?"
        own = chat_record(0, ("user", asked), ("assistant", f"{n * n}"))
        variant = chat_record(1, ("user", f"Square {n}."), ("assistant", f"{n * n}"), meta={"group": asked})
        spaced = chat_record(2, ("system", "Add."), ("user", f"what IS  {n} squared?\n"), ("assistant", "?"))
        assert len(sides(own, variant, spaced, chat_record(3, ("user", asked), source="b"))) == 1
        assert len(sides(text_record(0, asked), text_record(7, asked.upper(), source="b"))) == 1
        nothing_asked = [chat_record(m, ("assistant", f"Hello {n}."), source=s) for m, s in ((0, "a"), (9, "b"))]
        assert len(sides(*nothing_asked)) == 1
    assert len(sides(*(text_record(n, f"Text {n}") for n in range(20)))) == 2
    assert len(sides(*(chat_record(n, ("assistant", f"Hello {n}.")) for n in range(20)))) == 2
