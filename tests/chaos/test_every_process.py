"""SIGKILL of each process of a served run in each of its phases: nothing of it is left half a minute after its end.

Processes whose end a run survives are killed one after the other in one run; three servers an hour are replaced.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from figures import record
from private import Places, private_places
from test_launch import ranks_of, reached, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts folders of its own"),
]
ROW = "2. SIGKILL of each process of a served run in its phases"
Kill = tuple[str, str, int]  # a process, a phase, and for which time that begins
# Steps apart, in this order: 2 micro-batches a step; held-out questions are read before the first and after the 20th.
PHASES = {"loading": 0, "generation": 4, "scoring": 7, "saving": 10, "backward": 26, "evaluation": 2}
SURVIVED, ENDS_THE_RUN = ("api", "engine", "worker", "checker", "watchdog"), ("launcher", "rank")


def kills_of(turn: int) -> list[Kill]:
    """Each process that a run survives in another phase; over as many turns as there are phases, each in each."""
    phases = list(PHASES)
    taken = {phases[(turn + place) % len(phases)]: kind for place, kind in enumerate(SURVIVED)}
    return [(taken[phase], phase, times) for phase, times in PHASES.items() if phase in taken]


RUNS: dict[str, list[Kill]] = {
    **{f"goes on, turn {turn + 1}": kills_of(turn) for turn in range(len(PHASES))},
    **{f"{kind}, {phase}": [(kind, phase, times)] for kind in ENDS_THE_RUN for phase, times in PHASES.items()},
}
LEFT_LIMIT_S = 30
PHASE_LIMIT_S = 240
NAMES = {"engine": "EngineCor", "worker": "VLLM::Worker"}  # as vLLM calls them, and the kernel cuts it
WORDS = {"api": "--uds", "checker": "rlt.rewards.checker_process", "watchdog": "rlt.launching.watchdog"}


def victim(kind: str, launcher: psutil.Process) -> psutil.Process | None:
    """The process of that kind, once there is one."""
    if kind == "launcher":
        return launcher
    if kind == "rank":
        ranks = ranks_of(launcher.pid)
        return psutil.Process(ranks[0]) if ranks else None
    with suppress(psutil.NoSuchProcess):  # the launcher has just ended
        return next((process for process in launcher.children(recursive=True) if is_kind(kind, process)), None)
    return None


def is_kind(kind: str, process: psutil.Process) -> bool:
    try:
        return NAMES.get(kind, "none") in process.name() or WORDS.get(kind) in process.cmdline()
    except psutil.Error:  # it has just ended, or was killed before and is a zombie
        return False


def is_held(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def listeners(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    found = set()
    for process in processes:
        try:
            here = process.net_connections("inet")
        except psutil.Error:  # it has ended
            continue
        found |= {(c.laddr.ip, c.laddr.port) for c in here if c.status == psutil.CONN_LISTEN}
    return found


def start_run(places: Places, tiny_teacher: str, kills: list[Kill], folder: Path, log: Path) -> subprocess.Popen:
    """A tiny run, whose rank 0 holds its launcher (SIGSTOP) where a phase begins in which something is to be killed."""
    style = folder.with_name("style.yaml")
    style.write_text("solution_tags: ['e', '</never>']\n")  # so that random text has answers, which are to be checked
    keys = [
        *("run_cfg=grpo_verifier_tiny", f"model_name_or_path={tiny_teacher}", "bf16=false", "use_vllm=true"),
        *("train_batch_size=8", "per_device_train_batch_size=4", "num_generations=4", "max_completion_length=16"),
        *("dataset_size=12", "num_generations_eval=2", "eval_size=2", "eval_steps=20"),
        *("verifier=math", f"reasoning_format={style}", "max_steps=400", "save_steps=1", "save_total_limit=2"),
        f"output_dir={folder}",
    ]
    places_of = ",".join(f"{phase}:{times}:SIGSTOP" for _, phase, times in kills if phase != "loading")
    command = [*places.enter, sys.executable, str(ROOT / "launch.py"), "--servers=1", "1", *keys]
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    environment |= {"RLT_SIGNAL_AT": places_of} if places_of else {}
    with log.open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=ROOT, start_new_session=True)


def wait_for(phase: str, kind: str, launcher: psutil.Process) -> None:
    """Until rank 0 has held the launcher; at loading until the process that is meant has run for a second."""
    give_up = time.monotonic() + PHASE_LIMIT_S
    while not is_held(launcher) if phase != "loading" else victim(kind, launcher) is None:
        assert time.monotonic() < give_up, f"{phase} did not begin"
        time.sleep(0.005)
    time.sleep(1 if phase == "loading" else 0)


def kill_all(kills: list[Kill], launcher: psutil.Process) -> tuple[list[psutil.Process], set[tuple[str, int]]]:
    """Kill a process in each phase that is named; all processes that were there, and where they listened."""
    begun, ports = [launcher], set()
    for kind, phase, _ in kills:
        wait_for(phase, kind, launcher)
        begun += launcher.children(recursive=True)
        killed = victim(kind, launcher)
        assert killed is not None, f"no {kind} while {phase}"
        killed.kill()
        ports |= listeners(begun)
        if kind != "launcher":
            launcher.resume()
    return begun, ports


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_left(name, tiny_teacher, tmp_path):
    folder, log, kills = tmp_path / "run", tmp_path / "log", RUNS[name]
    goes_on = not any(kind in ENDS_THE_RUN for kind, _, _ in kills)
    with private_places(tmp_path, Path(tiny_teacher)) as places:
        run = start_run(places, tiny_teacher, kills, folder, log)
        launcher = psutil.Process(run.pid)
        try:
            begun, ports = kill_all(kills, launcher)
            if goes_on:
                done = (folder / "metrics.jsonl").read_text().count("\n")
                wait_until(lambda: run.poll() is not None or reached(folder, done + 2))
                begun += launcher.children(recursive=True) if run.poll() is None else []
                run.send_signal(signal.SIGTERM)
            code = run.wait(180)
        finally:
            if run.poll() is None:
                run.kill()
        ended = time.monotonic()
        _, living = psutil.wait_procs(begun, LEFT_LIMIT_S)
        while places.left() and time.monotonic() < ended + LEFT_LIMIT_S:
            time.sleep(0.5)
        left, open_still = places.left(), ports & listeners(list(psutil.process_iter()))
    what = ", ".join(f"{kind} while {phase}" for kind, phase, _ in kills)
    record(ROW, **{what: f"{len(living)} processes, {len(open_still)} ports, {len(left)} files left"})
    said = log.read_text()[-3000:]
    assert (code == 75) == goes_on, said
    assert (living, open_still, left) == ([], set(), []), said


def test_each_process_is_killed_once_in_each_phase():
    kills = [kill for run in RUNS.values() for kill in run]
    assert {*NAMES, *WORDS} == {*SURVIVED}
    assert Counter(kills) == Counter((kind, *phase) for kind in (*SURVIVED, *ENDS_THE_RUN) for phase in PHASES.items())
