"""All stages of a preparation, in order: those whose settings, inputs or predecessors changed run, the others are kept.

<output>/stages/03-quality/stats.json   what became of its rows; written last, with the key of what it was made from
                           shards/      what it kept
                           dropped/     what it did not keep, each row with its reason
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.formats.inputs import check_inputs, fingerprint, keep_to_inputs, parse_sources
from rlt.preparation.engine import Stopped, cancel_jobs, counts_file, read_counts, run_pass
from rlt.preparation.ledger import Counts, check_alike, check_chain
from rlt.preparation.progress import bar
from rlt.preparation.stage import Pass, Place, Stage, key_values
from rlt.preparation.stages import STAGES as BY_NAME
from rlt.preparation.stages import stages_of
from rlt.runs.folder import MARKER, STAGES
from rlt.schema import PrepareSettings

STATS = "stats.json"
KEY = "key"  # of an unfinished stage: what its tasks are made from
SECONDS = "seconds.json"  # apart from what is the same each time
FEW_ROWS = 1000  # for which starting processes takes longer than the work
LEFT = ("work", "counts", "progress", "refused", "logs", "jobs")

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class StageResult:
    """A stage that has ended."""

    name: str
    folder: Path
    counts: Counts
    seconds: float
    key: str  # what it was made from, as a hash


def prepare(settings: PrepareSettings, asked: Callable[[], bool]) -> list[StageResult]:
    """Run what is not done.

    Args:
        asked: whether the run was asked to stop.

    Raises:
        Refused: an input changed, a stage refuses its result, or a task did not end.
        LedgerError: a stage does not account for all of its rows.
        Stopped: the run was asked to stop.
    """
    output = Path(settings.output_dir)
    manifest = keep_to_inputs(output, _files_of(settings))
    key, before, results = sha256(json.dumps([manifest, settings.seed]).encode()).hexdigest(), None, []
    for number, stage in enumerate(stages_of(settings)):
        place = Place(output, output / STAGES / f"{number:02d}-{stage.name}", before)
        key = key_of(stage, key)
        result = finished(stage, place, key)
        if result is None:
            (output / MARKER).unlink(missing_ok=True)  # of an earlier life, with other settings
            result = run_stage(stage, place, key, results[-1].counts if results else None, asked)
            if number == 0:
                _see_that_nothing_changed(settings, place)
        check_chain(results[-1].counts if results else None, result.counts, f"stage {stage.name}")
        stage.check_counts(result.counts)
        results.append(result)
        before = place.folder
    _remove_others(output / STAGES, {result.folder for result in results})
    for name in BY_NAME.keys() - settings.stages:
        _remove_outputs(output, BY_NAME[name].outputs)
    return results


def _files_of(settings: PrepareSettings) -> list[Path]:
    return [path for _, path in check_inputs(parse_sources(settings.sources)) if path is not None]


def _see_that_nothing_changed(settings: PrepareSettings, place: Place) -> None:
    """While the inputs were read; else what was read of them is no result.

    Raises:
        Refused: an input changed, was added or is gone.
    """
    try:
        keep_to_inputs(place.output, _files_of(settings))
    except Refused:
        shutil.rmtree(place.folder)
        raise


def key_of(stage: Stage, before: str) -> str:
    """What a stage's result depends on, as one hash: its settings and version, files it reads, and the stage before."""
    files = {str(path): fingerprint(path) for path in stage.files()}
    made_from = [stage.name, stage.version, key_values(stage.settings, stage.depends_on()), files, before]
    return sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def finished(stage: Stage, place: Place, key: str) -> StageResult | None:
    """The result that is there, if it was made from the same."""
    stats: dict[str, Any] | None = read_json(place.folder / STATS)
    if stats is None or stats["key"] != key or stats["outputs"] != _outputs_of(stage, place.output):
        return None
    _clear(place.folder)  # a kill may have come right after the figures
    seconds = read_json(place.folder / SECONDS) or 0.0
    return StageResult(stage.name, place.folder, Counts.of_dict(stats), seconds, key)


def _clear(folder: Path) -> None:
    """What only tasks needed."""
    for left in LEFT:
        shutil.rmtree(folder / left, ignore_errors=True)
    (folder / KEY).unlink(missing_ok=True)


def run_stage(stage: Stage, place: Place, key: str, before: Counts | None, asked: Callable[[], bool]) -> StageResult:
    """Every pass of a stage; tasks that an earlier life of the same stage has done are not done again."""
    begin = time.monotonic()
    if read_json(place.folder / KEY) != key:
        if place.folder.exists():
            cancel_jobs(place)
            shutil.rmtree(place.folder)
        _remove_outputs(place.output, stage.folders())
        place.folder.mkdir(parents=True)
        write_whole(place.folder / KEY, json.dumps(key))
    passes = [_run_pass(stage, one, place, before, asked) for one in stage.passes()]
    check_alike(passes, f"stage {stage.name}")
    counts = passes[-1]
    check_chain(before, counts, f"stage {stage.name}")
    seconds = time.monotonic() - begin
    write_whole(place.folder / SECONDS, json.dumps(round(seconds, 3)))
    earlier = (read_json(place.before / STATS) or {}) if place.before else {}
    stats = {"key": key, "after": earlier.get("key"), "outputs": _outputs_of(stage, place.output), **counts.as_dict()}
    write_whole(place.folder / STATS, json.dumps(stats, indent=1))
    _clear(place.folder)
    logger.info("%s: %d of %d rows kept, %.1f s", stage.name, counts.kept, counts.read, seconds)
    return StageResult(stage.name, place.folder, counts, seconds, key)


def _run_pass(stage: Stage, one: Pass, place: Place, before: Counts | None, asked: Callable[[], bool]) -> Counts:
    """A pass of a stage, and what all of its tasks counted."""
    if asked():
        raise Stopped
    settings = stage.settings
    if before is not None and before.kept < FEW_ROWS and settings.engine == "local" and settings.engine_workers is None:
        settings = replace(settings, engine_workers=1)
    tasks = one.tasks or settings.engine_tasks
    with bar(place.folder / "progress", stage.name, one.name, before.kept if before else None):
        run_pass(stage.name, one, place, settings, tasks, asked)
    counts = Counts()
    for number in range(tasks):
        found = read_counts(counts_file(place, one.name, number))
        assert found is not None
        counts.add(found)
    return counts


def _outputs_of(stage: Stage, output: Path) -> dict[str, int]:
    """The bytes of each file that a stage has written for other runs."""
    files = [path for name in stage.folders() for path in sorted((output / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(output)): path.stat().st_size for path in files}


def _remove_outputs(output: Path, names: tuple[str, ...]) -> None:
    """Folders with what a stage has written for other runs, in an earlier form."""
    for name in names:
        shutil.rmtree(output / name, ignore_errors=True)


def _remove_others(folder: Path, kept: set[Path]) -> None:
    """Folders of stages that this run no longer has."""
    for other in set(folder.iterdir()) - kept:
        shutil.rmtree(other)


def results_of(output: Path) -> list[StageResult]:
    """What is there, without running anything: the stages that ended, up to the first that has to be made (again)."""
    found: list[StageResult] = []
    for folder in sorted((output / STAGES).glob("[0-9][0-9]-*")):
        stats = read_json(folder / STATS)
        if stats is None or stats["after"] != (found[-1].key if found else None):
            break
        seconds = read_json(folder / SECONDS) or 0.0
        found.append(StageResult(folder.name[3:], folder, Counts.of_dict(stats), seconds, stats["key"]))
    return found
