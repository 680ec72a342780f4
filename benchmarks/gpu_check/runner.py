"""Runs each part in a process of its own, ends it at its limit, and keeps what it had measured by then."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.record import write_atomically

ROOT = Path(__file__).resolve().parents[2]
TOTAL_LIMIT_S = 530
LEAST_S = 10  # with less left, a part is not begun
ERROR_LINES, ERROR_CHARACTERS = 25, 3000  # of a log's end, kept as a part's error
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "PYTHONUNBUFFERED": "1",  # the log of a part that is ended is whole
}


def run_parts(names: list[str], out: Path, device: str) -> dict[str, dict]:
    """The results by part; `out`/results.json is written anew after each."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    deadline, results = time.monotonic() + TOTAL_LIMIT_S, {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part does not outlive it
    with tempfile.TemporaryDirectory() as kernels:
        for number, name in enumerate(names):
            limit = limit_of(names[number:], deadline - time.monotonic())
            if limit < LEAST_S:
                error = f"{TOTAL_LIMIT_S} s were over before it"
                results[name] = {"status": "timeout", "seconds": 0.0, "error": error}
            else:
                results[name] = run_part(name, out, device, limit, kernels)
            write_atomically(out / "results.json", results)
            sys.stderr.write(f"{name}: {results[name]['status']} after {results[name]['seconds']:.0f} s\n")
    return results


def limit_of(names: list[str], left_s: float) -> float:
    """Seconds for the first of the parts that are to be run: its own limit, and its share of time that none needs."""
    own = PARTS[names[0]].limit_s
    return min(left_s, max(own, left_s * own / sum(PARTS[name].limit_s for name in names)))


def run_part(name: str, out: Path, device: str, limit: float, kernels: str) -> dict:
    """Status, seconds, figures and, where it was not ok, the error; its kernels go to `kernels`, for others."""
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder) / "figures.json", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "benchmarks.gpu_check", str(figures), "--device", device, "--part", name]
        start = time.monotonic()
        with log.open("wb") as said:
            code = exit_code(command, said, environment(device, folder, kernels), limit)
        seconds, text = time.monotonic() - start, log.read_text(errors="replace")
        measured = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    with (out / "log.txt").open("a", encoding="utf-8") as whole:
        whole.write(f"=== {name}\n{text}\n")
    status = "timeout" if code is None else "failed" if code else "ok"
    result = {"status": status, "seconds": round(seconds, 1), **measured}
    if status != "ok":
        said = "\n".join(text.splitlines()[-ERROR_LINES:])[-ERROR_CHARACTERS:]
        result["error"] = f"ended at its limit of {limit:.0f} s\n{said}" if code is None else said
    return result


def environment(device: str, folder: str, kernels: str) -> dict[str, str]:
    """Of a part: its temporary files go with it; on the CPU it sees no GPU."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{kernels}/inductor", "TRITON_CACHE_DIR": f"{kernels}/triton"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **ENVIRONMENT, **caches, **hidden, "TMPDIR": folder}


def exit_code(command: list[str], said, environment: dict[str, str], limit: float) -> int | None:
    """None when it was ended at its limit; whatever it started ends with it."""
    process = subprocess.Popen(
        command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
