"""SIGKILL of each process of a served run in turn: nothing of it is left half a minute after the run's end."""

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from figures import record
from test_launch import ranks_of, reached, start, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LEFT_LIMIT_S = 30
GOES_ON = ("api", "engine")  # the run replaces them


def segments_of(process: psutil.Process) -> set[Path]:
    """Shared memory that a process has mapped, of whatever name."""
    try:
        return {Path(region.path) for region in process.memory_maps() if region.path.startswith("/dev/shm/psm_")}
    except psutil.Error:  # it has just ended
        return set()


def victim(kind: str, launcher: psutil.Process) -> psutil.Process:
    if kind == "launcher":
        return launcher
    if kind == "rank":
        return psutil.Process(ranks_of(launcher.pid)[0])
    (api,) = (p for p in launcher.children() if "--uds" in p.cmdline())
    return api if kind == "api" else next(p for p in api.children() if "EngineCore" in p.name())


@pytest.mark.parametrize("kind", ["launcher", "rank", *GOES_ON])
def test_nothing_is_left(kind, tiny_run, tmp_path):
    steps = ["max_steps=12", "save_steps=1000", "eval_size=0", f"output_dir={tmp_path / 'run'}"]
    with TemporaryDirectory(dir="/dev/shm") as place:  # short, as sockets need it
        process = start("--servers=1", "1", *tiny_run, "use_vllm=true", *steps, stderr=tmp_path / "log", TMPDIR=place)
        launcher = psutil.Process(process.pid)
        wait_until(lambda: reached(tmp_path / "run", 3))
        begun = launcher.children(recursive=True)
        (rank,) = ranks_of(process.pid)
        shared = {Path(psutil.Process(rank).environ()["RLT_WEIGHTS_FOLDER"])}.union(*map(segments_of, begun))
        os.kill(victim(kind, launcher).pid, signal.SIGKILL)
        process.wait(400)
        assert (process.returncode == 0) == (kind in GOES_ON), (tmp_path / "log").read_text()[-3000:]
        _, left = psutil.wait_procs(begun, LEFT_LIMIT_S)
        wait_until(lambda: not any(path.exists() for path in shared), LEFT_LIMIT_S)
        files = [path.name for path in Path(place).iterdir() if "wandb" not in path.name]  # the launcher's, at import
    record("2. SIGKILL of a process of a served run", **{kind: f"{len(left)} processes, {len(files)} files left"})
    assert not left and not files
