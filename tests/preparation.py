"""Small preparations for tests: settings, rows, and what is left behind."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from conftest import config_of

from rlt.planning.trl_fields import typed_settings
from rlt.preparation.run import SECONDS, StageResult, prepare
from rlt.preparation.shards import read_shard
from rlt.runs.folder import mark_complete
from rlt.schema import PrepareSettings

QUICK = ["read", "clean", "split", "write"]  # stages that need no library


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def questions(count: int, first: int = 0) -> list[dict[str, str]]:
    """Sums that differ in their numbers."""
    numbers = range(first, first + count)
    return [{"question": f"How much is {n} and {n * n}?", "solution": f"It is {n + n * n}."} for n in numbers]


def settings_of(output: Path, sources: list[Any], **changed: Any) -> PrepareSettings:
    """The settings of prepare_tiny with other sources, in one process, stages that need no library by default."""
    config = config_of("run_cfg=prepare_tiny", f"output_dir={output}")
    settings = typed_settings({**config, "sources": [s if isinstance(s, dict) else str(s) for s in sources]})
    return dataclasses.replace(settings, **{"stages": QUICK, "engine_workers": 1, **changed})


def run(settings: PrepareSettings) -> dict[str, StageResult]:
    """Every stage's result, by name."""
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    results = prepare(settings, lambda: False)
    mark_complete(Path(settings.output_dir), {"rows": results[-1].counts.kept})
    return {result.name: result for result in results}


def kept(result: StageResult) -> list[dict[str, Any]]:
    return [row for path in sorted((result.folder / "shards").iterdir()) for row in read_shard(path)]


def dropped(result: StageResult) -> list[dict[str, Any]]:
    return [row for path in sorted((result.folder / "dropped").iterdir()) for row in read_shard(path)]


def ids_hash(result: StageResult) -> str:
    return hashlib.sha256("\n".join(sorted(row["id"] for row in kept(result))).encode()).hexdigest()


def bytes_below(folder: Path) -> dict[str, str]:
    """The hash of every file that should be the same each time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SECONDS, ".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
