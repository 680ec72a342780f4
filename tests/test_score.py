"""score.py as a user runs it."""

import json
import math
import re

import pandas
import pytest
from conftest import launch

from rlt.commands.score import best_index, read_lines


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    end = "<|end_of_explanation|>"
    lines = [
        {"id": "a", "question": "2+2?", "solution": "4", "completion": f"Count on.{end}"},
        {"id": "b", "question": "3+3?", "solution": "6", "completions": [f"Double it.{end}", "no end"]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(rows, output, tiny_teacher, tiny_student, *overrides):
    models = [f"teacher_model={tiny_teacher}", f"student_model={tiny_student}"]
    return launch("score.py", f"input={rows}", f"output={output}", *models, *overrides)


def test_lines_are_written_again_with_rewards_and_parts(rows, tmp_path, tiny_teacher, tiny_student):
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student, "reduction_kl_fn=[median,sum]")
    assert done.returncode == 0, done.stderr
    one, two = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert one["id"] == "a"
    assert one["match_reward"] == 0
    assert two["match_reward"] == [0, -1]
    assert one["reward"] == pytest.approx(one["solution_log_prob_reward"] + one["kl_reward"] + one["match_reward"])
    expected = -(3 * one["reasoning_kl_median"] + 0.03 * one["reasoning_kl_sum"])
    assert one["kl_reward"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reduction_kl_fn=[mean]"], "of one length"),
        (["temperature=0"], "temperature=0 must be above 0"),
        (["dtype=int8"], "float32 or bfloat16"),
        (["student_model=./none"], "model path does not exist"),
        (["clip_kll=1"], "did you mean clip_kl"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(rows, tmp_path, tiny_teacher, tiny_student, overrides, says):
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student, *overrides)
    assert done.returncode != 0
    assert says in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_an_existing_output_is_not_overwritten(rows, tmp_path, tiny_teacher, tiny_student):
    (tmp_path / "out.jsonl").write_text("precious")
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student)
    assert "would be overwritten" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_only_line_ends_end_a_line_and_an_empty_file_is_refused(rows, tmp_path):
    rows.write_text(json.dumps({**json.loads(rows.read_text().splitlines()[0]), "id": "a\u2028b"}, ensure_ascii=False))
    assert [row["id"] for row in read_lines(rows)] == ["a\u2028b"]
    rows.write_text("\n")
    done = score(rows, tmp_path / "out.jsonl", "embedded/smollm2-135m-instruct", "embedded/smollm2-135m-instruct")
    assert "has no line to score" in done.stderr and done.returncode == 1


def test_rows_come_from_parquet_too(rows, tmp_path):
    written = list(read_lines(rows))
    pandas.DataFrame(written).to_parquet(tmp_path / "rows.parquet")  # with an empty cell for what a row lacks
    found = list(read_lines(tmp_path / "rows.parquet"))
    assert [{k: v for k, v in row.items() if v is not None} for row in found] == written
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a Parquet file, or a damaged one"):
        list(read_lines(tmp_path / "cut.parquet"))


def test_a_system_prompt_that_is_no_text_is_refused(rows):
    rows.write_text(json.dumps({**json.loads(rows.read_text().splitlines()[0]), "student_system_prompt": 3}))
    with pytest.raises(ValueError, match="row 1: student_system_prompt must be text, not 3"):
        list(read_lines(rows))


def test_a_row_that_is_longer_than_the_context_is_named_before_anything_is_scored(
    rows, tmp_path, tiny_teacher, tiny_student
):
    long = {"question": "Why?", "solution": "4", "completions": ["short", " so" * 2100]}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student)
    assert done.returncode == 1 and "Loading weights" not in done.stderr
    said = r"row 3: with completion 2 the text has 2\d\d\d tokens, and the context of teacher_model 2048: shorten"
    assert re.search(said, done.stderr.splitlines()[-1])
    assert not list(tmp_path.glob("out*"))


def test_none_is_best_where_no_reward_is_finite():
    assert best_index([-math.inf, -1.0], [2, 1]) == 1
    assert best_index([-math.inf, -math.inf], [1, 2]) is None


def test_a_line_that_is_not_json_is_named(rows, tmp_path, tiny_teacher, tiny_student):
    rows.write_text(rows.read_text() + "{oops\n")
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student)
    assert "line 3 is not JSON" in done.stderr


def test_a_reward_is_chosen_by_its_name_and_the_ratio_is_told(rows, tmp_path, tiny_teacher, tiny_student):
    done = score(rows, tmp_path / "out.jsonl", tiny_teacher, tiny_student, "reward_cfg=spike", "report_rsr=true")
    assert done.returncode == 0, done.stderr
    one, two = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = -(3 * one["reasoning_kl_mean"] + 0.3 * one["reasoning_kl_top_share"])
    assert one["kl_reward"] == pytest.approx(expected)
    assert one["rsr"] > 0 and len(two["rsr"]) == 2
