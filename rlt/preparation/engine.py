"""Who runs the tasks of a pass: datatrove's executors, on this machine, on Slurm or on Ray; one code for all.

A task is done when its counts are on the disk, whoever ran it: what a killed run has done stays done on any engine.
What a task refuses is written beside its counts, since a refusal in another process, or on another machine, has no
other way back.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import loguru
import psutil
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from rlt.durable import write_whole
from rlt.errors import Refused
from rlt.launching.lifetime import end_with, kill_all_but_trackers, stop_signals
from rlt.preparation.ledger import Counts, read_counts
from rlt.preparation.stage import Pass, Place, ProgressNote, Task
from rlt.preparation.stages import STAGES
from rlt.schema import PrepareSettings

POLL_S = 1.0
COMMAND_LIMIT_S = 60  # of Slurm's commands
GRACE_S = 60.0  # between a job's end and its files on a network file system

logger = logging.getLogger("rlt")


class Stopped(Exception):
    """A run was asked to stop between two tasks."""


class TaskStep(PipelineStep):
    """A pass of a stage, as datatrove runs it; made again from names wherever it runs."""

    name = "preparation"

    def __init__(self, stage: str, pass_name: str, place: Place, settings: PrepareSettings):
        super().__init__()
        self.stage, self.pass_name, self.place, self.settings = stage, pass_name, place, settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        run_task(self.stage, self.pass_name, self.place, self.settings, rank, world_size)
        yield from ()


def run_task(stage: str, pass_name: str, place: Place, settings: PrepareSettings, number: int, of: int) -> None:
    """One task, unless it is done; its counts, or what it refused, are written last."""
    if read_counts(counts_file(place, pass_name, number)) is not None:
        return
    run = next(found for found in STAGES[stage](settings).passes() if found.name == pass_name)
    task = Task(place, number, of, ProgressNote(progress_file(place, pass_name, number)))
    try:
        counts = run.run(task) or Counts()
    except Refused as error:
        write_whole(refusal_file(place, pass_name, number), str(error))
        return
    counts.check(f"{stage}, task {number}")
    write_whole(counts_file(place, pass_name, number), json.dumps(counts.as_dict()))


def counts_file(place: Place, pass_name: str, number: int) -> Path:
    return place.folder / "counts" / f"{pass_name}-{number:05d}.json"


def progress_file(place: Place, pass_name: str, number: int) -> Path:
    return place.folder / "progress" / f"{pass_name}-{number:05d}"


def refusal_file(place: Place, pass_name: str, number: int) -> Path:
    return place.folder / "refused" / f"{pass_name}-{number:05d}"


def missing_tasks(place: Place, pass_name: str, tasks: int) -> list[int]:
    return [n for n in range(tasks) if read_counts(counts_file(place, pass_name, n)) is None]


def run_pass(
    stage: str, one: Pass, place: Place, settings: PrepareSettings, tasks: int, asked: Callable[[], bool]
) -> None:
    """Every task of a pass that is not done yet.

    Args:
        asked: whether the run was asked to stop.

    Raises:
        Refused: a task refused its input, or did not end; says where its log is.
        Stopped: the run was asked to stop.
    """
    missing = missing_tasks(place, one.name, tasks)
    if not missing:
        return
    for number in missing:
        refusal_file(place, one.name, number).unlink(missing_ok=True)
        for file in (counts_file, refusal_file):
            file(place, one.name, number).parent.mkdir(parents=True, exist_ok=True)
    job_file(place, one.name).parent.mkdir(exist_ok=True)
    step = TaskStep(stage, one.name, place, settings)
    logs = place.folder / "logs" / one.name
    ENGINES[settings.engine](step, logs, tasks, settings, asked)
    for number in missing:
        if (refusal := refusal_file(place, one.name, number)).is_file():
            raise Refused(refusal.read_text(encoding="utf-8"))
    if left := missing_tasks(place, one.name, tasks):
        raise Refused(
            f"{stage}: {len(left)} of {tasks} tasks did not end (the first: {left[0]}); their logs are in {logs}, "
            "and the same command goes on"
        )


class _Local(LocalPipelineExecutor):
    """datatrove's local executor, task by task: its own pool waits for a killed process for ever."""

    def one(self, rank: int) -> None:
        loguru.logger.disable("datatrove")  # whose words on a failure come before those of this project
        self._run_for_rank(rank, local_rank=1)


def workers_of(settings: PrepareSettings, tasks: int) -> int:
    """Processes at once on this machine."""
    return max(1, min(tasks, settings.engine_workers or len(os.sched_getaffinity(0))))


def _run_locally(step: TaskStep, logs: Path, tasks: int, settings: PrepareSettings, asked: Callable[[], bool]) -> None:
    executor = _Local([step], tasks=tasks, logging_dir=str(logs), skip_completed=False)
    missing, workers = missing_tasks(step.place, step.pass_name, tasks), workers_of(settings, tasks)
    if workers > 1:
        _run_in_processes(executor, missing, workers, asked)
        return
    for rank in missing:
        if asked():
            raise Stopped
        executor.one(rank)


def _run_in_processes(executor: _Local, ranks: Iterable[int], workers: int, asked: Callable[[], bool]) -> None:
    """In children of this process, which end with it: one that stayed behind would write beside the next life's."""
    others = set(psutil.Process().children())
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (os.getpid(),)) as pool:
        waiting: set[Future[None]] = set()
        try:
            for rank in ranks:  # refused as well where the first one is killed before the last one is given
                waiting.add(pool.submit(executor.one, rank))
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if asked() and waiting:  # what they do is done again
                    raise Stopped
        except BrokenProcessPool:
            raise Refused(
                "a process of this preparation was killed (out of memory?): the same command goes on; fewer at once "
                "are engine_workers=1"
            ) from None
        finally:
            if waiting:
                pool.shutdown(wait=False, cancel_futures=True)
                kill_all_but_trackers(set(psutil.Process().children()) - others)


def _begin_worker(run: int) -> None:
    """Signals to stop are for the run, which ends its workers itself."""
    end_with(run)
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def _run_on_ray(step: TaskStep, logs: Path, tasks: int, settings: PrepareSettings, asked: Callable[[], bool]) -> None:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):  # no cluster is named: one of this machine's own
            options |= {"num_cpus": workers_of(settings, tasks), "include_dashboard": False}
        ray.init(**options)
    try:
        RayPipelineExecutor(
            [step],
            tasks=tasks,
            workers=settings.engine_workers or -1,
            mem_per_cpu_gb=settings.engine_memory_gb,
            logging_dir=str(logs),
            skip_completed=False,
        ).run()
    finally:
        if started:
            ray.shutdown()


def _run_on_slurm(step: TaskStep, logs: Path, tasks: int, settings: PrepareSettings, asked: Callable[[], bool]) -> None:
    """As a job array, whose end is waited for.

    A run that stops leaves the job to go on. The next one waits for it, as two jobs would write the same files.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    class Submitted(SlurmPipelineExecutor):
        def launch_merge_stats(self) -> None:
            """No second job for datatrove's own statistics: the ledger has the counts."""

    noted = job_file(step.place, step.pass_name)
    if noted.is_file():
        _wait_for_job(noted.read_text(encoding="utf-8"), step, tasks, asked)
    if _refused(step, tasks) or not missing_tasks(step.place, step.pass_name, tasks):
        return
    assert settings.slurm_partition is not None  # the plan refuses it
    executor = Submitted(
        [step],
        tasks=tasks,
        workers=settings.engine_workers or -1,
        time=settings.slurm_time,
        partition=settings.slurm_partition,
        mem_per_cpu_gb=settings.engine_memory_gb,
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        sbatch_args=settings.slurm_options,
        qos=settings.slurm_options.get("qos", ""),
        mail_type="NONE",
        job_name=f"prepare-{step.stage}",
        logging_dir=str(logs),
        skip_completed=False,
    )
    with _outside_of_a_job():
        executor.run()
    write_whole(noted, str(executor.job_id))
    _wait_for_job(str(executor.job_id), step, tasks, asked)


def job_file(place: Place, pass_name: str) -> Path:
    """Names the job of Slurm that has a pass's tasks."""
    return place.folder / "jobs" / pass_name


def cancel_jobs(place: Place) -> None:
    """Of a stage whose results nobody wants: its jobs, if it has any, write no more."""
    for noted in (place.folder / "jobs").glob("*"):
        subprocess.run(
            ["scancel", noted.read_text(encoding="utf-8")], capture_output=True, timeout=COMMAND_LIMIT_S, check=False
        )


def _wait_for_job(job: str, step: TaskStep, tasks: int, asked: Callable[[], bool]) -> None:
    """Until the job has ended, and its files are seen here.

    Raises:
        Stopped: the run was asked to stop.
    """
    end = None
    while missing_tasks(step.place, step.pass_name, tasks) and (end is None or time.monotonic() < end):
        if asked():
            logger.warning("Slurm's job %s goes on: the same command waits for it", job)
            raise Stopped
        if end is None and not _in_queue(job):
            end = time.monotonic() + (0 if _refused(step, tasks) else GRACE_S)
        time.sleep(POLL_S)


def _refused(step: TaskStep, tasks: int) -> bool:
    return any(refusal_file(step.place, step.pass_name, number).is_file() for number in range(tasks))


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """datatrove takes a process with this variable for one of its own tasks."""
    held = os.environ.pop("SLURM_ARRAY_TASK_ID", None)
    try:
        yield
    finally:
        if held is not None:
            os.environ["SLURM_ARRAY_TASK_ID"] = held


def _in_queue(job: str) -> bool:
    """Whether Slurm still has a job to run, or runs it; a queue that does not answer now is asked again."""
    try:
        found = subprocess.run(
            ["squeue", "-h", "-j", job],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return True
    if found.returncode and "Invalid job id" not in found.stderr:
        return True
    return bool(found.stdout.strip())


ENGINES: dict[str, Callable[[TaskStep, Path, int, PrepareSettings, Callable[[], bool]], None]] = {
    "local": _run_locally,
    "ray": _run_on_ray,
    "slurm": _run_on_slurm,
}
