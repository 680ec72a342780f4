"""The same command gives the same digits, at the size of the embedded model and on all threads there are."""

import pytest
from conftest import launch

from rlt.durable import read_json_lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_runs_of_one_command_end_with_the_same_bytes(tmp_path):
    keys = ["teacher_rlt_tiny", "warmup_run=null", "max_steps=2", "bf16=false", "max_completion_length=32"]
    seen = []
    for name in ("once", "again"):
        folder = tmp_path / name
        done = launch("train.py", *keys, "eval_size=0", "report_to=null", f"output_dir={folder}", limit_s=900)
        assert done.returncode == 0, done.stderr[-3000:]
        losses = [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]
        seen.append(((folder / "model.safetensors").read_bytes(), losses))
    assert seen[0] == seen[1] and len(seen[0][1]) == 2
