"""A training that stands still is named, then ended; one that goes on, or is held from outside, is not."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT, launch

LOOKS = "standstill.LOOK_S, standstill.NAMED_S = 0.02, 0.2\n"
BEGIN = f"""
import logging, time
from rlt.survival import standstill
{LOOKS}
logging.basicConfig(format="%(message)s")
watch = standstill.EndStandstill(limit_s=1.5)

def step(seconds):
    watch.on_step_begin(None, None, None)
    time.sleep(seconds)
    watch.on_step_end(None, None, None)

def computes(seconds):
    watch.on_step_begin(None, None, None)
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass
    watch.on_step_end(None, None, None)

def waits_for_somebody():
    watch.on_step_begin(None, None, None)
    print("waiting", flush=True)
    time.sleep(60)

with watch:
"""


def training(what: str, behind: str = "") -> list[str]:
    """A process that is watched while it does `what`, and then does what is `behind`."""
    return [sys.executable, "-c", f"{BEGIN}{textwrap.indent(what, '    ')}\n{behind}"]


def test_the_place_is_named_and_after_the_limit_the_process_ends():
    began = time.monotonic()
    done = subprocess.run(
        training("step(0.05); waits_for_somebody()"), capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    named, ended = "it stands in", "and only waited in 2 of them: this process ends; set a larger ddp_timeout"
    assert done.stderr.count(named) == 1 and ended in done.stderr
    assert done.stderr.index(named) < done.stderr.index(ended) < done.stderr.rindex("in waits_for_somebody")
    assert time.monotonic() - began < 40  # not the minute that it would sleep


def test_one_that_goes_on_is_left_alone():
    command = training("step(0.1)\nfor _ in range(20): step(0.15)", behind="time.sleep(2)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert "not gone on" not in done.stderr


def test_one_that_computes_for_longer_than_the_limit_is_named_and_goes_on():
    done = subprocess.run(
        training("step(0.05); computes(2)"), capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0
    assert "it stands in" in done.stderr and "in computes" in done.stderr


def test_time_in_which_it_was_held_does_not_count():
    process = subprocess.Popen(
        training("step(0.05); waits_for_somebody()"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None  # 1.5 s are over, of which it had a fifth
    assert process.wait(30) == 1
    process.communicate()


@pytest.mark.slow
def test_a_run_whose_reward_never_returns_ends(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "endless_reward.py").write_text(
        "import time\n\n\ndef endless(completions, **rows):\n    time.sleep(600)\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = next(word for word in tiny_run if word.startswith("model_name_or_path="))
    keys = ["grpo_exact", model, "reward_functions=[endless_reward.endless]", "ddp_timeout=20", "report_to=null"]
    done = launch("train.py", *keys, "use_vllm=false", "bf16=false", "eval_size=0", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "and only waited in 2" in done.stderr and "in endless" in done.stderr
