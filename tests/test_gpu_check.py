"""The GPU's check in its form for a CPU, as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.parts import PARTS, Part
from benchmarks.gpu_check.random_models import tokenizer_of
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.table import table

LIMIT_S = 500


def check(folder, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [str(ROOT / "scripts" / "gpu_check.sh"), str(folder), "--device", "cpu", *arguments]
    environment = {**os.environ, "RLT_PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    return done, json.loads((folder / "results.json").read_text())


def test_a_part_leaves_its_figures_and_a_table(tmp_path):
    done, results = check(tmp_path, "--parts", "head")
    assert done.returncode == 0, done.stderr
    assert results["head"]["status"] == "ok"
    assert results["head"]["float32"]["worst_gap_nats"] < 1e-4
    assert done.stdout.startswith("head        ok")


@pytest.mark.slow
def test_every_part_is_ok_on_a_cpu(tmp_path):
    done, results = check(tmp_path)
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(PARTS, "ok"), done.stdout
    assert done.returncode == 0
    assert results["attention"]["float32"]["layouts"] == 8
    assert results["grpo_12gb"]["trained_moved"] == results["grpo_12gb"]["trained"] > 0
    assert results["offload"]["worst_reward_gap"] < 1e-4


def test_parts_that_are_named_alone_have_the_time_of_the_others():
    assert runner.limit_of(list(PARTS), 530) == PARTS["attention"].limit_s
    assert runner.limit_of(["update", "scoring"], 540) == 540 * 100 / 180
    assert runner.limit_of(["scoring"], 240) == 240
    assert runner.limit_of(["attention", "head"], 12) == 12


def test_a_part_over_its_limit_is_ended_with_what_it_started(tmp_path):
    started = tmp_path / "pid"
    command = ["bash", "-c", f"sleep 100 & echo $! > {started}; wait"]
    with (tmp_path / "log").open("wb") as said:
        assert runner.exit_code(command, said, dict(os.environ), limit=1.0) is None
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until its parent has seen its end
            os.kill(int(started.read_text()), signal.SIG_DFL)
            time.sleep(0.1)


def test_a_part_that_fails_keeps_its_figures_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "absent", Part("absent", 60))
    result = runner.run_part("absent", tmp_path, "cpu", 60, str(tmp_path))
    assert result["status"] == "failed"
    assert "invalid choice: 'absent'" in result["error"]
    assert "=== absent" in (tmp_path / "log.txt").read_text()


def test_a_claim_that_does_not_hold_fails_the_part_at_its_end(tmp_path):
    record = Record(tmp_path / "figures.json", "cpu")
    record.claim("1 is 2", holds=False)
    record.add(after=1.0)
    with pytest.raises(SystemExit, match="did not hold: 1 is 2"):
        record.finish()
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["unmet"] == ["1 is 2"] and kept["after"] == 1.0
    shown = table({"part": {"status": "failed", "seconds": 2.0, "error": "…", **kept}})
    assert shown.splitlines()[1:] == ["    did not hold: 1 is 2", "    after 1"]


def test_the_tokenizer_made_in_code_reads_its_own_words_again():
    tokenizer = tokenizer_of(20_000)
    assert len(tokenizer) == 20_000
    words = list(range(300, 20_000, 97))
    assert tokenizer(tokenizer.decode(words)).input_ids == words
    assert tokenizer.decode(tokenizer("Grüße, 12 <|im_end|>\n").input_ids) == "Grüße, 12 <|im_end|>\n"
