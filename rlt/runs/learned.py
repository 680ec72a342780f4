"""Which questions a model was trained on, as the folders of the runs that it came from tell."""

import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from rlt.data.sources import Rows, load_rows
from rlt.data.splits import hold_out, questions_of
from rlt.durable import as_json_lines, read_json, read_json_lines, write_whole
from rlt.errors import Refused
from rlt.places import LOCAL_STARTS
from rlt.prompts.styles import load_format
from rlt.runs.folder import ALL_TRACES, HELD_OUT, LEARNED, saved_configuration
from rlt.schema import profile_of

logger = logging.getLogger("rlt")


def lineage(model: Path) -> Iterator[dict]:
    """Configurations of the run that made a model, and of those that made what it started from.

    A run's output folder is a model, and so are its `merged` and `checkpoint-N`.

    A folder that is gone since is said: what stands behind it is not known.

    Raises:
        Refused: a pipeline's folder, which is no model.
    """
    inside = model.name == "merged" or model.name.startswith("checkpoint-")
    for place in [model, model.parent] if inside else [model]:
        config = saved_configuration(place)
        if config is None:
            continue
        profile = profile_of(config)
        if profile.stages:
            raise Refused(f"{place} is a pipeline: name one of its stages, {place}/STAGE")
        if profile.learns_from == "pairs":
            config["dataset_id_or_path"] += f"/{ALL_TRACES}"
            config["dataset_size"] = None  # of pairs, there
        yield {**config, "output_dir": str(place)}  # where it is now
        before = config["model_name_or_path"]
        if before is None:  # its weights were random
            return
        if _is_gone(before):
            logger.warning("%s was made from %s, which is gone: what that was trained on is not known", place, before)
        yield from lineage(Path(before).expanduser())
        return


def _is_gone(model: str) -> bool:
    """Whether a model's name is a path at which nothing stands; one of the hub is none."""
    is_path = model.startswith(LOCAL_STARTS) or model.count("/") != 1
    return is_path and not Path(model).expanduser().exists()


def rows_of(config: dict) -> Rows:
    """What a run's source holds."""
    style = load_format(config["reasoning_format"])
    return load_rows(
        config["dataset_id_or_path"],
        split=config["dataset_split"],
        seed=config["dataset_seed"],
        size=config["dataset_size"],
        tags=(style.thought_tags, style.solution_tags),
    )


def learned_rows(config: dict) -> list[dict]:
    """What a training run learns from: its source, without what it holds out.

    Raises:
        Refused: the source is gone, or has other rows than those that the run was trained on.
    """
    if profile_of(config).learns_from == "text":  # which has no questions of its own
        return []
    rows, folder = rows_of(config).rows, Path(config["output_dir"])
    if (file := folder / HELD_OUT).is_file():
        held_out = questions_of(read_json_lines(file))
        rows = [row for row in rows if not questions_of([row]) & held_out]
    written = read_json(folder / LEARNED)
    if written is not None:  # it has begun
        if profile_of(config).learns_from != "pairs" and written != identity_of(rows):
            raise Refused(f"{config['dataset_id_or_path']} has other rows now than {folder} was trained on")
        return rows
    if file.is_file():
        return rows
    if config["eval_size"] and config["eval_dataset_id_or_path"] is None:  # it has yet to begin
        return hold_out(rows, config["eval_size"], config["dataset_seed"])[0]
    return rows


def learned_questions(model: str) -> set[str]:
    """Normalised questions that the runs which a model came from have trained on.

    Sources that are gone since are said, and left out.
    """
    found: set[str] = set()
    for config in lineage(Path(model).expanduser()):
        try:
            found |= questions_of(learned_rows(config))
        except Refused as error:
            logger.warning("what %s was trained on is not known: %s", config["output_dir"], error)
    return found


def check_held_out(folder: Path, rows: list[dict]) -> None:
    """That a run which goes on holds out what it held out before, with which its evaluations are paired.

    Raises:
        Refused: its source, or that of a run which it started from, has changed.
    """
    file = folder / HELD_OUT
    if file.is_file() and rows and questions_of(rows) != questions_of(read_json_lines(file)):
        raise Refused(
            f"output_dir={folder}: the held-out questions are others than when this run began, because the data "
            "changed: name another output_dir, or overwrite_output_dir=true"
        )


def write_held_out(folder: Path, rows: list[dict]) -> None:
    """Leave the questions that a run holds out, as a dataset that its model may be evaluated on."""
    write_whole(folder / HELD_OUT, as_json_lines(rows))


def identity_of(rows: list[dict]) -> dict[str, int | str]:
    """How many rows there are, and a sum over all that they hold, in their order."""
    total = sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=str).encode())
    return {"rows": len(rows), "sha256": total.hexdigest()}


def check_training_rows(folder: Path, rows: list[dict]) -> None:
    """That a run which goes on trains on what it began with.

    Raises:
        Refused: its source has changed.
    """
    before, now = read_json(folder / LEARNED), identity_of(rows)
    if before is not None and before != now:
        raise Refused(
            f"output_dir={folder}: the training rows are others than when this run began ({before['rows']} there, "
            f"{now['rows']} now), because the data changed: name another output_dir, or overwrite_output_dir=true"
        )


def write_training_rows(folder: Path, rows: list[dict]) -> None:
    """Leave what `check_training_rows` compares a later life's rows with."""
    write_whole(folder / LEARNED, json.dumps(identity_of(rows)))
