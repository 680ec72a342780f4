"""One preparation on every engine: the same rows, whoever runs the tasks."""

import random

import pytest
import slurm_here
from bible import chapters, edited
from conftest import EMBEDDED, launch
from preparation import ids_hash, questions, write_rows

from rlt.preparation.evaluation_sets import items_of
from rlt.preparation.run import StageResult, results_of
from rlt.preparation.stages import STAGES

LIMIT_S = 900  # each of thirteen stages starts processes that import what it needs
EXACT, NEAR, CONTAMINATED = 40, 60, 30  # rows that are dropped
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]
ON = {
    "two processes": ["engine_workers=2"],
    "ray": ["engine=ray", "engine_workers=2", "engine_memory_gb=1"],
    "slurm": ["engine=slurm", "slurm_partition=all", "engine_memory_gb=1", "slurm_time=00:10:00"],
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    draw = random.Random(0)
    some = chapters("kjv")[: 2 * NEAR]
    copies = [edited(text[:1500], 0.01, draw) for text in some[:NEAR]]
    told = [f"What is told here? {text[:1500]}" for text in (*some, *copies)]
    asked = [item.question for item in items_of("human-eval")][:CONTAMINATED]
    rows = [*questions(300), *questions(EXACT), *questions(300, first=1000)]
    rows += [{"question": text, "solution": "It is told above."} for text in (*told, *asked)]
    source = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    every = ["prepare_rlt", f"stages=[{','.join(STAGES)}]", f"tokenizer={EMBEDDED}", "validation_share=0.1"]
    return [*every, f"sources=[{source}]"]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("alone") / "out"
    done = launch("prepare.py", *arguments, "engine_workers=1", f"output_dir={output}")
    assert done.returncode == 0, done.stderr
    results = results_of(output)
    lost = {result.name: sum(result.counts.dropped.values()) for result in results}
    assert lost["exact"] >= EXACT and lost["near"] >= NEAR // 2 and lost["decontamination"] >= CONTAMINATED // 2
    return ids_hash(written(results))


def written(results: list[StageResult]) -> StageResult:
    return next(result for result in results if result.name == "write")


def check(arguments: list[str], engine: str, output, alone: str, **environment: str) -> None:
    done = launch("prepare.py", *arguments, *ON[engine], f"output_dir={output}", limit_s=LIMIT_S, **environment)
    assert done.returncode == 0, done.stderr
    assert ids_hash(written(results_of(output))) == alone


def test_two_processes_keep_the_rows_that_one_keeps(arguments, alone, tmp_path):
    check(arguments, "two processes", tmp_path / "out", alone)


def test_ray_keeps_the_rows_that_one_process_keeps(arguments, alone, tmp_path):
    check(arguments, "ray", tmp_path / "out", alone)


@pytest.mark.skipif(bool(slurm_here.missing()), reason="needs Debian's slurmctld, slurmd, slurm-client and munge")
def test_slurm_keeps_the_rows_that_one_process_keeps(arguments, alone, tmp_path):
    with slurm_here.slurm(tmp_path / "slurm") as environment:
        check([*arguments, "engine_tasks=2"], "slurm", tmp_path / "out", alone, **environment)
