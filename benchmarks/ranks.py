"""Two training processes of one thread each against one of one thread: tokens per second of whole steps."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import MODEL, ROOT, Setting, alternate, figure, main, write_report

STEPS = 3
LIMIT_S = 1800


def worker(variant: str, setting: Setting) -> dict:
    """Seconds of the median step; one has the 32 completions of `teacher_rlt_tiny`, with one process and with two."""
    processes = int(variant)
    with tempfile.TemporaryDirectory() as folder:
        run = [
            f"model_name_or_path={MODEL}",
            f"max_completion_length={setting.completion_tokens}",
            "generation_kwargs={ignore_eos:true}",
            f"output_dir={folder}/run",
            *(f"max_steps={STEPS}", "eval_size=0", "report_to=null", "save_steps=100"),
        ]
        command = [sys.executable, str(ROOT / "launch.py"), str(processes), "teacher_rlt_tiny", "ddp", *run]
        cores = sorted(os.sched_getaffinity(0))[:processes]  # one thread each
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        records = [
            json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    seconds = sorted(record["step_time"] for record in records if "step_time" in record)
    return {"seconds": seconds[len(seconds) // 2]}


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["2", "1"], settings, 2, out)
    figures = []
    for setting in settings:
        two, one = ([run["seconds"] for run in results[name, setting]] for name in ("2", "1"))
        figures.append(figure(f"two_processes_{setting}", two, one, "s", command))
    return write_report(out, figures, {})


if __name__ == "__main__":
    main(__file__, worker, report, usual=["g8"])
