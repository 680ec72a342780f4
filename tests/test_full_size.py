"""Every full-size training run is built: its trainer over tiny models and a few rows, all other keys as they are."""

import json
from pathlib import Path

import pandas
import pytest
from conftest import ROOT, build, config_of

from rlt.runs.folder import ALL_TRACES
from rlt.schema import profile_of

RUNS = sorted(path.stem for path in (ROOT / "cfgs" / "run_cfg").glob("*.yaml"))
FULL_SIZE = [
    run
    for run, config in ((run, config_of(run)) for run in RUNS)
    if config.get("requires") == "gpu" and profile_of(config).trains and profile_of(config).learns_from != "text"
]
SMALL = {
    "requires": "null",
    "use_vllm": "false",
    "bf16": "false",
    "report_to": "null",
    "train_batch_size": 8,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_prompt_length": 512,
    "max_completion_length": 64,
}


END = "<|end_of_explanation|>"
QUESTIONS = range(40)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`rows.jsonl`, questions with explanations; beside it a collection's two ranked traces of each."""
    folder = tmp_path_factory.mktemp("data")
    asked = [{"question": f"1 + {n}?", "solution": str(n + 1)} for n in QUESTIONS]
    rows = [{**row, "reasoning_trace": f"Adding gives {row['solution']}."} for row in asked]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ranked = [
        {**row, "question_id": n, "reward": -rank, "matched": True, "completion": f"{rank}: {row['question']}{END}"}
        for n, row in enumerate(rows)
        for rank in (1, 2)
    ]
    (folder / ALL_TRACES).parent.mkdir()
    pandas.DataFrame(ranked).to_parquet(folder / ALL_TRACES)
    return folder


@pytest.mark.parametrize("run", FULL_SIZE)
def test_every_full_size_training_run_is_built(run, data, tiny_teacher, tiny_student, tmp_path, in_root):
    config = config_of(run)
    source = data if profile_of(config).learns_from == "pairs" else data / "rows.jsonl"
    models = {"student_model": tiny_student, "teacher_model": tiny_teacher}
    given = {**SMALL, **models, "model_name_or_path": tiny_teacher, "dataset_id_or_path": source}
    given["eval_size"] = min(config["eval_size"], 4)
    trainer, _ = build([run], tmp_path, *(f"{key}={value}" for key, value in given.items() if key in config))
    assert len(trainer.train_dataset) >= len(QUESTIONS) - 4
    assert trainer.args.learning_rate == config["learning_rate"]
