"""A pipeline that is stopped and started again: what its stages read is what they read before, and what is secret stays
out of everybody's sight."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, config_of, launch

from rlt.jobs.pipeline import Stage, check_fresh, note_read, note_what_is_there, read_by, stages_of
from rlt.runs.folder import MARKER

STAGES = "stages=[{name:a,run:student_sft_tiny},{name:ab,run:evaluate_tiny,set:{model_name_or_path:'{a}'}}]"
SECRET = "hf_a_token_that_nobody_may_read"


def stages_in(folder: Path) -> list[Stage]:
    return stages_of(config_of("pipeline_tiny", STAGES, f"output_dir={folder}"))


def finish(stage: Stage, name: str, content: str) -> None:
    """What a stage leaves: its configuration, what it made, its marker."""
    folder = Path(stage.folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(*stage.arguments)))
    (folder / name).write_text(content)
    (folder / MARKER).write_text('{"steps": 99, "epochs": 99}')


def test_a_stage_reads_what_the_stages_that_it_names_have_made(tmp_path):
    first, second = stages_in(tmp_path)
    finish(first, "model.safetensors", "weights")
    assert read_by(second, [first])["a"].keys() == {"model.safetensors"}
    assert read_by(first, [second]) == {}  # one name begins with the other


def test_a_finished_stage_is_not_kept_when_what_it_read_is_made_again_whatever_life_makes_it(tmp_path):
    first, second = stages_in(tmp_path)
    finish(first, "model.safetensors", "weights")
    note_read(tmp_path, second, [first])
    finish(second, "evaluation.json", "{}")
    check_fresh(tmp_path, second, [first])
    shutil.rmtree(first.folder)
    finish(first, "model.safetensors", "weights")  # the same again
    check_fresh(tmp_path, second, [first])
    finish(first, "model.safetensors", "others")
    with pytest.raises(ValueError, match="stage ab has begun or is complete, and a, which it reads, was made again"):
        check_fresh(tmp_path, second, [first])
    shutil.rmtree(second.folder)
    check_fresh(tmp_path, second, [first])


def test_a_stage_that_left_no_note_is_held_to_what_is_there_when_the_pipeline_starts(tmp_path):
    first, second = stages_in(tmp_path)
    finish(second, "evaluation.json", "{}")
    note_what_is_there(tmp_path, [(stage, config_of(*stage.arguments)) for stage in (first, second)])
    check_fresh(tmp_path, second, [first])
    finish(first, "model.safetensors", "weights")
    with pytest.raises(ValueError, match="was made again"):
        check_fresh(tmp_path, second, [first])


@pytest.fixture
def two_stages(tiny_teacher, tmp_path):
    """A pipeline's command, for a learning rate of its first stage."""

    def command(rate: str) -> list[str]:
        shared = "max_steps:2,dataset_size:4,train_batch_size:4,per_device_train_batch_size:4,bf16:false"
        shared += f",hub_token:{SECRET}"
        stages = [
            f"{{name:{name},run:teacher_sft_tiny,set:{{{shared},model_name_or_path:'{model}',learning_rate:{rate_of_it}}}}}"
            for name, model, rate_of_it in (("a", tiny_teacher, rate), ("b", "{a}", "1e-3"))
        ]
        return ["pipeline_tiny", f"stages=[{','.join(stages)}]", f"output_dir={tmp_path / 'run'}"]

    return command


@pytest.mark.slow
def test_stages_get_their_secrets_and_no_command_line_file_or_log_has_them(two_stages, tmp_path):
    seen = set()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *two_stages("1e-3"), "report_to=wandb"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "WANDB_MODE": "offline"},
    )  # fmt: skip
    with process:
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    seen.add(" ".join(child.cmdline()))
                except psutil.Error:  # it has ended
                    continue
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        said = process.stdout.read() + process.stderr.read()
    assert process.returncode == 0, said[-3000:]
    assert sum("teacher_sft_tiny" in line for line in seen) == 2
    assert [line for line in seen if SECRET in line] == []
    assert SECRET not in said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    for stage in "ab":
        assert yaml.safe_load((tmp_path / "run" / stage / "config.yaml").read_text())["hub_token"] == "<hidden>"


@pytest.mark.slow
def test_a_pipeline_stopped_behind_a_stage_that_was_made_again_does_not_keep_the_later_ones(two_stages, tmp_path):
    folder = tmp_path / "run"
    assert launch("train.py", *two_stages("1e-3")).returncode == 0
    for name in (MARKER, "report.html"):  # as a kill before the report leaves it
        (folder / name).unlink()
    shutil.rmtree(folder / "a")
    for _ in range(2):  # the first of these lives makes `a` again
        refused = launch("train.py", *two_stages("2e-3"))
        assert refused.returncode == 1
        assert "and a, which it reads, was made again since" in refused.stderr.splitlines()[-1]
    assert (folder / "a" / MARKER).is_file()


@pytest.mark.parametrize("written", [f"hub_token={SECRET}(", f"hub_token={SECRET},b", f"+hub_token={SECRET}{{"])
def test_a_secret_that_cannot_be_read_is_not_shown_in_the_refusal(written):
    with pytest.raises(ValueError, match="hub_token=<hidden>") as refused:
        config_of("teacher_sft_tiny", written)
    assert SECRET not in str(refused.value)
