"""Parts of a collection or an evaluation: a later life goes on only with what the first one began with."""

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import config_of, launch, save_tiny, spawn_ranks

from rlt.prompts.styles import FORMATS, ReasoningFormat
from rlt.runs.parts import Parts, check_parts, models_of, part_size

STYLE = FORMATS["stratos"]
ROWS = [{"question": f"{n} + 1?", "solution": str(n + 1), "prompt": "rendered"} for n in range(4)]


def weights_of(folder: Path, version: int) -> None:
    """A model's weights: of one size, whatever the version."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 2**18 + bytes([version]))


@pytest.fixture
def job(tmp_path):
    """The configuration of an evaluation of a local model."""
    weights_of(tmp_path / "model", version=100)
    (tmp_path / "out").mkdir()
    return config_of("evaluate_tiny", f"model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [(30, 4, 8), (8, 1, 8), (3, 1, 3), (100, 13, 8), (256, 32, 8), (5000, 32, 157)],
)
def test_without_a_number_eight_devices_have_work_and_parts_depend_on_the_questions_alone(count, size, parts, tmp_path):
    assert part_size(count) == size
    ranges = Parts(tmp_path, count, None).ranges
    assert len(ranges) == parts and [number for part in ranges for number in part] == list(range(count))
    assert {len(part) for part in ranges[:-1]} <= {size}
    (whole,) = Parts(tmp_path, count, 5000).ranges  # a number that is named is taken as it is
    assert whole == range(count)


def test_the_shipped_evaluation_leaves_the_number_to_the_questions_and_the_tiny_one_does_not():
    assert config_of("evaluate", "model_name_or_path=m")["questions_at_once"] is None
    assert config_of("evaluate_tiny")["questions_at_once"] == 32


class Stop:
    asked = False


def live(job, rows=ROWS, style=STYLE, count=4) -> Parts:
    """A life of the job: parts of two rows, of which it comes to the first `count` rows'."""
    parts = Parts(Path(job["output_dir"]), len(rows), 2)
    parts.keep_to(Accelerator(cpu=True), job, rows, style)
    parts.ranges = parts.ranges[: count // 2]
    parts.work(Accelerator(cpu=True), Stop, lambda part: [rows[number] for number in part])
    return parts


def test_the_same_sources_go_on_with_the_next_part(job):
    live(job, count=2)
    assert live(job).read() == ROWS


def test_a_copy_of_the_weights_goes_on_and_so_does_what_is_complete_without_them(job, tmp_path):
    live(job, count=2)
    os.utime(tmp_path / "model" / "model.safetensors", (7, 7))
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = {**job, "model_name_or_path": str(tmp_path / "moved")}
    assert live(moved).read() == ROWS
    (tmp_path / "moved" / "model.safetensors").unlink()
    check_parts(moved, models_of(moved))


def test_weights_that_changed_between_two_lives_are_refused(job, tmp_path):
    live(job, count=2)
    weights_of(tmp_path / "model", version=101)
    with pytest.raises(ValueError, match=f"the weights of model_name_or_path={tmp_path / 'model'} changed.*overwrite_"):
        live(job)
    weights_of(tmp_path / "model", version=100)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="the weights"):
        live(job)


def test_weights_that_changed_since_the_last_part_are_seen_from_the_configuration_alone(job, tmp_path):
    live(job)
    check_parts(job, models_of(job))
    weights_of(tmp_path / "model", version=101)
    with pytest.raises(ValueError, match="the weights of model_name_or_path"):
        check_parts(job, models_of(job))
    check_parts({**job, "overwrite_output_dir": True}, models_of(job))


def test_the_students_weights_count_where_there_is_one(job, tmp_path):
    weights_of(tmp_path / "student", version=100)
    collection = {**job, "student_model": str(tmp_path / "student")}
    live(collection, count=2)
    weights_of(tmp_path / "student", version=101)
    with pytest.raises(ValueError, match="the weights of student_model"):
        live(collection)


def test_an_adapters_weights_are_its_own_files(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"12345")
    (tmp_path / "training_args.bin").write_bytes(b"")
    known = {"adapter_model.bin": [5, sha256(b"12345").hexdigest()]}
    assert models_of({"model_name_or_path": str(tmp_path)}) == {"model_name_or_path": known}
    assert models_of({"model_name_or_path": "embedded/smollm2-135m-instruct"}) == {"model_name_or_path": {}}


@pytest.mark.parametrize(
    "now",
    [
        [{"question": "new?", "solution": "1"}, *ROWS],
        ROWS[::-1],
        [*ROWS[:3], {**ROWS[3], "solution": "5"}],
        [*ROWS[:3], {**ROWS[3], "student_system_prompt": "Be brief."}],
    ],
)
def test_rows_that_moved_or_changed_are_refused(job, now):
    live(job, count=2)
    with pytest.raises(ValueError, match="the questions of dataset_id_or_path=reasoning_gym/gsm_symbolic changed"):
        live(job, rows=now)


def test_a_format_that_was_edited_is_refused_and_a_prompt_with_todays_date_is_not(job):
    live(job, count=2)
    with pytest.raises(ValueError, match="the tags or prompts of reasoning_format=stratos changed"):
        live(job, style=ReasoningFormat("stratos", student_system_prompt="Answer."))
    live(job, rows=[{**row, "prompt": "rendered another day"} for row in ROWS])


def test_before_the_first_part_everything_may_change(job, tmp_path):
    live(job, count=0)
    weights_of(tmp_path / "model", version=101)
    live(job, rows=ROWS[::-1], count=2)
    assert live(job, rows=ROWS[::-1]).read() == ROWS[::-1]


def refused_together(rank: int, job: dict, port: int) -> None:
    """Rank 1 sees nothing new, and is told all the same."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    rows = ROWS if rank else ROWS[::-1]
    with pytest.raises(ValueError, match="the questions of dataset_id_or_path"):
        live(job, rows=rows)


@pytest.mark.slow
def test_all_ranks_are_refused_together(job):
    from rlt.launching.environment import free_port

    live(job, count=2)
    spawn_ranks(refused_together, (job, free_port()))


@pytest.mark.slow
def test_an_evaluation_of_a_student_that_was_trained_again_half_way_is_refused(tmp_path):
    student, out = tmp_path / "student", tmp_path / "out"
    save_tiny(student, seed=1)
    small = ["dataset_size=4", "questions_at_once=2", "max_completion_length=8", "samples_per_question=1"]
    run = ["evaluate_tiny", *small, "pass_at=[1]", f"model_name_or_path={student}", f"output_dir={out}"]
    killed = launch("train.py", *run, RLT_KILL_AT="evaluating:2")
    assert killed.returncode == -9 and len(list((out / "parts").glob("*.jsonl"))) == 1, killed.stderr[-3000:]
    save_tiny(student, seed=2)
    refused = launch("train.py", *run)
    assert refused.returncode == 1
    assert f"the weights of model_name_or_path={student} changed after its first part" in refused.stderr
    again = launch("train.py", *run, "overwrite_output_dir=true")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((out / "evaluation.json").read_text())["questions"] == 4
