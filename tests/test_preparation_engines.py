"""One preparation on every engine: the same rows, whoever runs the tasks."""

import pytest
import slurm_here
from conftest import launch
from preparation import ids_hash, questions, write_rows

from rlt.preparation.run import results_of

STAGES = "stages=[read,clean,exact,near,decontamination,split,write]"  # row by row, and over all rows
ON = {
    "two processes": ["engine_workers=2"],
    "ray": ["engine=ray", "engine_workers=2", "engine_memory_gb=1"],
    "slurm": ["engine=slurm", "slurm_partition=all", "engine_memory_gb=1", "slurm_time=00:10:00"],
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    rows = [*questions(300), *questions(40), *questions(300, first=1000)]
    source = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    return ["prepare_rlt", f"sources=[{source}]", STAGES, "validation_share=0.1"]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("alone") / "out"
    done = launch("prepare.py", *arguments, "engine_workers=1", f"output_dir={output}")
    assert done.returncode == 0, done.stderr
    last = results_of(output)[-1]
    assert last.counts.kept == 600
    return ids_hash(last)


def check(arguments: list[str], engine: str, output, alone: str, **environment: str) -> None:
    done = launch("prepare.py", *arguments, *ON[engine], f"output_dir={output}", **environment)
    assert done.returncode == 0, done.stderr
    assert ids_hash(results_of(output)[-1]) == alone


@pytest.mark.slow
def test_two_processes_keep_the_rows_that_one_keeps(arguments, alone, tmp_path):
    check(arguments, "two processes", tmp_path / "out", alone)


@pytest.mark.slow
def test_ray_keeps_the_rows_that_one_process_keeps(arguments, alone, tmp_path):
    check(arguments, "ray", tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(slurm_here.missing()), reason="needs Debian's slurmctld, slurmd, slurm-client and munge")
def test_slurm_keeps_the_rows_that_one_process_keeps(arguments, alone, tmp_path):
    with slurm_here.slurm(tmp_path / "slurm") as environment:
        check([*arguments, "engine_tasks=2"], "slurm", tmp_path / "out", alone, **environment)
