"""Five kills at each marked point of each stage, one piece of work apart: the same command ends as the undisturbed one.

`./run_tests.sh -m slow tests/test_kills.py`; half an hour on two cores.
"""

import json
import signal
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import TINY_RUN, launch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
KILLS = 5
STEPS = ["max_steps=7", "save_steps=1"]
SMALL = ["train_batch_size=2", "per_device_train_batch_size=2", "bf16=false", *STEPS]
# The second time that a point is reached in a life: each life gets one piece of work further.
POINTS = [
    ("warm-up", "backward:2"),
    ("warm-up", "saving:2"),
    ("GRPO", "generation:2"),
    ("GRPO", "scoring:2"),
    ("GRPO", "backward:4"),  # two micro-batches a step
    ("GRPO", "saving:2"),
    ("collection", "collecting:2"),
    ("collection", "scoring:2"),
    ("distillation", "backward:2"),
    ("distillation", "saving:2"),
    ("on-policy distillation", "generation:2"),
    ("on-policy distillation", "scoring:2"),
    ("on-policy distillation", "backward:4"),  # two micro-batches a step
    ("on-policy distillation", "saving:2"),
    ("preferences", "saving:2"),
    ("evaluation", "evaluating:2"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Worked questions, and a collection's ranked traces of them."""
    folder = tmp_path_factory.mktemp("rows")
    worked = [{"question": f"{n} + 1?", "solution": str(n + 1), "reasoning_trace": f"{n} and 1."} for n in range(14)]
    (folder / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worked))
    ranked = [
        {**row, "question_id": n, "completion": f"It is {row['solution']}{mark}", "reward": reward, "matched": True}
        for n, row in enumerate(worked)
        for mark, reward in ((".", 0.0), ("!", -1.0))
    ]
    # Any sentence ends an explanation, as tiny random models write no tag.
    (folder / "short.yaml").write_text(yaml.safe_dump({"name": "short", "explanation_tags": ["<explain>", "."]}))
    (folder / "all").mkdir()
    pandas.DataFrame(ranked).to_parquet(folder / "all" / "traces.parquet")
    return folder


@pytest.fixture(scope="module")
def stages(rows, tiny_run, tiny_teacher, tiny_student) -> dict[str, list[str]]:
    """A command of each stage, but for its output folder."""
    questions, parts = f"dataset_id_or_path={rows / 'worked.jsonl'}", ["bf16=false", "questions_at_once=2"]
    teacher, student = f"model_name_or_path={tiny_teacher}", f"model_name_or_path={tiny_student}"
    asked = ["traces_per_question=2", "min_format_rate=0", "max_completion_length=48", "dataset_size=14"]
    own_samples = [*TINY_RUN[1:], "use_vllm=false", student, f"teacher_model={tiny_teacher}", *STEPS, "eval_size=0"]
    loss_alone = ["eval_size=0", "eval_steps=null", "load_best_model_at_end=false"]
    return {
        "warm-up": ["teacher_sft_tiny", questions, teacher, *SMALL],
        "GRPO": [*tiny_run, *STEPS, "eval_size=0"],
        "collection": ["collect_tiny", *asked, *parts, f"reasoning_format={rows / 'short.yaml'}"],
        "distillation": ["student_distill_tiny", questions, student, *SMALL, *loss_alone],
        "on-policy distillation": ["student_opd_tiny", *own_samples],
        "preferences": ["dpo_tiny", f"dataset_id_or_path={rows}", teacher, *SMALL, "min_margin=0.1"],
        "evaluation": ["evaluate_tiny", questions, student, *parts, "max_completion_length=8", "pass_at=[1]"],
    }


def results(folder: Path) -> dict[str, bytes | torch.Tensor]:
    """The weights, or the rows."""
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    return {path.name: path.read_bytes() for path in folder.glob("**/*.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory):
    found: dict[str, dict] = {}

    def of(stage: str) -> dict:
        if stage not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            done = launch("train.py", *stages[stage], f"output_dir={folder}")
            assert done.returncode == 0, done.stderr[-3000:]
            found[stage] = results(folder)
        return found[stage]

    return of


@pytest.mark.parametrize(("stage", "point"), POINTS)
@pytest.mark.timeout(1200)  # seven lives
def test_five_kills_change_nothing(stage, point, stages, undisturbed, tmp_path):
    command = [*stages[stage], f"output_dir={tmp_path}"]
    for _ in range(KILLS):
        killed = launch("train.py", *command, RLT_KILL_AT=point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert not (tmp_path / "COMPLETE").exists()
    done = launch("train.py", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = results(tmp_path), undisturbed(stage)
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
