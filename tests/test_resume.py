"""A run that is killed anywhere goes on as if nothing had happened, bit for bit."""

import json
import signal

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file

ONE_POINT = ["backward:4"]
EVERY_POINT = ["generation:2", "scoring:2", *ONE_POINT, "saving:2", "finishing:1"]
STEPS = ["save_steps=1", "eval_steps=3", "sync_ref_model=true", "ref_model_sync_steps=2"]


def weights(folder) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def assert_same(left, right) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    held_out = [(folder / "evaluations.jsonl").read_text() for folder in (left, right)]
    assert json.loads(held_out[0].splitlines()[-1]) == json.loads(held_out[1].splitlines()[-1])


def succeed(done):
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
    """Six steps without a break; generations of two steps are made together, so that a buffer is cut in the middle."""
    folder = tmp_path_factory.mktemp("straight")
    succeed(
        launch("train.py", *tiny_run, *STEPS, "max_steps=6", "generation_aggregation_steps=4", f"output_dir={folder}")
    )
    return folder


@pytest.mark.parametrize("points", [ONE_POINT, pytest.param(EVERY_POINT, marks=pytest.mark.slow)])
def test_killed_at_marked_points_and_continued(points, tiny_run, straight, tmp_path):
    command = [*tiny_run, *STEPS, "max_steps=6", "generation_aggregation_steps=4", f"output_dir={tmp_path}"]
    for point in points:
        killed = launch("train.py", *command, RLT_KILL_AT=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr[-2000:])
        assert not (tmp_path / "COMPLETE").exists()
    continued = launch("train.py", *command)
    succeed(continued)
    assert "INFO rlt: resuming from" in continued.stderr
    assert_same(straight, tmp_path)
    again = launch("train.py", *command)
    assert "is complete" in again.stdout


# On a CPU bitsandbytes packs 4-bit weights whose rows are whole blocks of 64, which the tiny models' are not.
EMBEDDED = "model_name_or_path=embedded/smollm2-135m-instruct"
LORA = ["use_peft=true", "lora_r=4", "student_model=null", "learning_rate=1e-2"]
ADAPTERS = {
    "lora": LORA,
    "bfloat16": [*LORA, "bf16=true"],
    "4-bit": [*LORA, EMBEDDED, "load_in_4bit=true"],
    "8-bit": [*LORA, EMBEDDED, "load_in_8bit=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_with_vllm_goes_on_bit_for_bit(kind, tiny_run, tmp_path):
    run = [*(o for o in tiny_run if not o.startswith("use_vllm")), *ADAPTERS[kind], "save_steps=1", "eval_steps=2"]
    for folder, lengths in (("straight", [4]), ("resumed", [2, 4])):
        for steps in lengths:
            succeed(launch("train.py", *run, f"max_steps={steps}", f"output_dir={tmp_path / folder}"))
    assert_same(tmp_path / "straight", tmp_path / "resumed")
    moved = weights(tmp_path / "straight")
    assert all(value.dtype == torch.float32 for value in moved.values())
    assert all(value.any() for name, value in moved.items() if "lora_B" in name)


@pytest.mark.slow
def test_with_vllm_three_steps_and_three_more_equal_six(tiny_run, tmp_path):
    run = [o for o in tiny_run if not o.startswith("use_vllm")]
    for folder, lengths in (("straight", [6]), ("resumed", [3, 6])):
        for steps in lengths:
            succeed(launch("train.py", *run, *STEPS, f"max_steps={steps}", f"output_dir={tmp_path / folder}"))
    assert_same(tmp_path / "straight", tmp_path / "resumed")


def exchange(source, operation: str) -> None:
    """Twelve sums or products of one place, in the same file."""
    made = [{"question": f"{n} {operation} 2?", "solution": str(n), "reasoning_trace": "easy"} for n in range(12)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in made))


SFT = ["run_cfg=teacher_sft_tiny", "report_to=null", "bf16=false", "dataset_size=4", "train_batch_size=4"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_run_whose_training_rows_were_exchanged_does_not_go_on(kind, tiny_run, tiny_teacher, tmp_path):
    exchange(tmp_path / "rows.jsonl", "+")
    sft = [*SFT, "per_device_train_batch_size=4", f"model_name_or_path={tiny_teacher}"]
    command = [*(tiny_run if kind == "grpo" else sft), "eval_size=0", "eval_steps=null", "save_steps=1"]
    command += [f"dataset_id_or_path={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    succeed(launch("train.py", *command, "max_steps=1"))
    exchange(tmp_path / "rows.jsonl", "*")
    refused = launch("train.py", *command, "max_steps=2")
    assert refused.returncode == 1
    assert "the training rows are others than when this run began" in refused.stderr.splitlines()[-1]
