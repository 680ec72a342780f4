"""The split: by group, by a hash that nothing else moves."""

from stage_alone import run_alone, text_record

from rlt.preparation.split import Split


def split_of(rows: list[dict]) -> dict[str, str]:
    return {row["id"]: row["meta"]["split"] for row in rows}


def grouped(count: int, of_each: int) -> list[dict]:
    return [text_record(n, f"{n}", meta={"group": f"problem {n // of_each}"}) for n in range(count)]


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
