"""The process that checks answers, with a library in it that runs what a model wrote: it gives away nothing, and costs
its trainer one answer."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from rlt.rewards.checker import PASSED_ON, START_LIMIT_S
from rlt.rewards.verifiers import Verifier

# In the place of math-verify.
LIBRARY_WITH_A_HOLE = """
import re
from types import SimpleNamespace

grader = SimpleNamespace(sympy_numeric_eq=None, sympy_solve_and_compare=None)
LatexExtractionConfig = LatexNormalizationConfig = SimpleNamespace

def parse(text, *_, **__):
    if program := re.search("run ([0-9a-f]+) it", text):
        exec(bytes.fromhex(program[1]).decode(), {})
    return [text.strip("$")]

def verify(gold, given, **_):
    sums = [text for text in (*gold, *given) if re.fullmatch("[0-9+]+", text)]
    return len(sums) == 2 and eval(sums[0]) == eval(sums[1])
"""
FIND_LINE = """
import os, socket, stat, time
fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
line = max(fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISSOCK(os.fstat(fd).st_mode))
"""
SOLUTION = {"solution": "2+0"}
GONE_LIMIT_S = 30.0


@pytest.fixture
def verifier(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    (library / "math_verify.py").write_text(LIBRARY_WITH_A_HOLE)
    monkeypatch.setenv("PYTHONPATH", str(library))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RLT_SERVER_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    return Verifier("math")


def run(program: str) -> str:
    return f"\\text{{run {program.encode().hex()} it}}"


def processes() -> list[psutil.Process]:
    """The warm parent that was started last, and its child."""
    parents = [p for p in psutil.Process().children() if "rlt.rewards.checker_process" in p.cmdline()]
    parent = max(parents, key=lambda process: process.pid)
    return [parent, *parent.children()]


def test_an_ordinary_answer_is_checked(verifier):
    assert [verifier.check(answer, SOLUTION) for answer in ("1+1", "3+3")] == [1.0, 0.0]


def test_no_secret_stands_in_the_environment_of_the_process_and_torch_is_not_loaded(verifier):
    verifier.check("1+1", SOLUTION)
    both = processes()
    assert len(both) == 2
    for process in both:
        assert "canary" not in Path(f"/proc/{process.pid}/environ").read_text()
        assert set(process.environ()) <= {*PASSED_ON, "PYTHONPATH", "OMP_NUM_THREADS", "LC_CTYPE"}
        assert not any("libtorch" in region.path for region in process.memory_maps())
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (FIND_LINE + "os.write(line, PICKLE); time.sleep(60)", "was answered with what is no score"),
        (FIND_LINE + "os.write(line, b'\\x00' * 4096); time.sleep(60)", "was answered with what is no score"),
        (FIND_LINE + "os.write(line, b'\\x00\\x00\\x00'); time.sleep(60)", "took too long"),
        (FIND_LINE + "os.write(line, b'\\x7f' * 8); time.sleep(60)", "was answered with what is no score"),
        (FIND_LINE + "os.close(line); time.sleep(60)", "ended the process that checks"),
        ("import os; os._exit(0)", "ended the process that checks"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended the process that checks"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "took too long"),
        ("import ctypes; ctypes.string_at(0)", "ended the process that checks"),
        ("b'x' * 2**30", "ended the process that checks"),
        ("[bytearray(2**20) for _ in range(2**20)]", "ended the process that checks"),
        ("while True: pass", "took too long"),
    ],
)
def test_an_answer_that_takes_its_checker_over_is_wrong_and_the_next_is_checked(
    verifier, tmp_path, caplog, program, says
):
    made = tmp_path / "made by a pickle"
    pickled = f"cposix\nmkdir\n(V{made}\ntR.".encode()
    with caplog.at_level(logging.WARNING, logger="rlt"):
        found = verifier.check_batch([run(program.replace("PICKLE", repr(pickled))), "1+1"], [SOLUTION] * 2)
    assert found == [0.0, 1.0]
    assert verifier.failures == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"of a batch of 2 answers these count as wrong unchecked: 1 {says}"
    ]
    assert not made.exists()


def test_the_process_can_neither_fill_the_disk_nor_leave_an_image_of_its_memory(verifier, tmp_path):
    full = tmp_path / "full"
    program = f"open({str(full)!r}, 'wb', buffering=0).write(b'x' * 2**20)"
    assert verifier.check(run(program), SOLUTION) == 0.0
    assert full.read_bytes() == b""
    verifier.check("1+1", SOLUTION)
    limits = Path(f"/proc/{processes()[1].pid}/limits").read_text()
    assert {"Max core file size": "0", "Max open files": "64", "Max processes": "0"}.items() <= {
        line[:25].strip(): line[26:46].strip() for line in limits.splitlines()
    }.items()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("whose", [0, 1], ids=["parent", "child"])
def test_a_process_that_is_killed_or_held_is_replaced(verifier, monkeypatch, whose, number):
    monkeypatch.setattr("rlt.rewards.checker.FORK_LIMIT_S", 1.0)
    assert verifier.check("1+1", SOLUTION) == 1.0
    before = processes()
    os.kill(before[whose].pid, number)
    verifier.check_batch([run("while True: pass")], [SOLUTION])
    assert verifier.check("1+1", SOLUTION) == 1.0
    before[1].wait(GONE_LIMIT_S)
    assert len(processes()) == 2 and not before[1].is_running()


def test_a_process_that_is_killed_while_it_starts_is_started_again(verifier, monkeypatch):
    begun = []

    def start_and_kill_the_first(*arguments, **options):
        begun.append(popen(*arguments, **options))
        if len(begun) == 1:
            begun[0].kill()
        return begun[-1]

    popen = subprocess.Popen
    monkeypatch.setattr("rlt.rewards.checker.subprocess.Popen", start_and_kill_the_first)
    assert verifier.check_batch(["2"], [SOLUTION]) == [1.0]
    assert len(begun) == 2


def test_a_process_that_never_starts_ends_the_run(verifier, tmp_path):
    (tmp_path / "library" / "math_verify.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended 3 times while it started"):
        verifier.check_batch(["2"], [SOLUTION])


def test_both_processes_end_with_a_trainer_that_is_killed_while_it_waits(verifier):
    check = f"Verifier('math', limit_s=600).check({run('while True: pass')!r}, {SOLUTION})"
    program = f"from rlt.rewards.verifiers import Verifier; {check}"
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        watched = psutil.Process(trainer.pid)
        found: list[psutil.Process] = []
        give_up = time.monotonic() + START_LIMIT_S
        while len(found) < 2:
            assert trainer.poll() is None and time.monotonic() < give_up
            found = watched.children(recursive=True)
    finally:
        trainer.kill()
        trainer.wait()
    assert psutil.wait_procs(found, GONE_LIMIT_S)[1] == []


def test_what_a_batch_had_no_time_for_is_wrong_unchecked_and_said_once(verifier, caplog):
    verifier = Verifier("math", limit_s=0.4, ddp_timeout=6.0)
    assert verifier.check("1+1", SOLUTION) == 1.0
    answers = ["1+1", "2+0", None, *[run("while True: pass")] * 12, "1+1"]
    with caplog.at_level(logging.WARNING, logger="rlt"):
        found = verifier.check_batch(answers, [SOLUTION] * len(answers))
    assert found == [1.0, 1.0, *[0.0] * 14]
    assert verifier.failures == 13
    (said,) = [record.getMessage() for record in caplog.records]
    assert "of a batch of 16 answers" in said and "took too long" in said and "came after the batch's 1 s" in said
    assert verifier.check("1+1", SOLUTION) == 1.0
