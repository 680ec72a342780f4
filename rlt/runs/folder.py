"""What an output folder holds, by name, and who may write there: one module owns every file, marker and check of it.

Imports nothing heavy: the plan looks at folders before a run.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.places import MARKER as MARKER  # written last, with what was done
from rlt.places import PREPARED as PREPARED  # of a preparation: the rows that other runs read
from rlt.runs.hidden import hide_secrets
from rlt.schema import profile_of, renamed

logger = logging.getLogger("rlt")

CONFIG = "config.yaml"  # the resolved configuration, secrets hidden
LOGS = "logs"  # of ranks and servers
METRICS = "metrics.jsonl"  # one object per log
CURVES = "curves.png"
COMPLETIONS = "completions"  # step-00001.parquet and so on
EVALUATIONS = "evaluations.jsonl"  # held-out questions, one object per evaluation
HELD_OUT = "held_out.jsonl"  # the questions that a run holds out, as a dataset
LEARNED = "training_rows.json"  # how many rows a run trains on, and their sum
CHECKPOINTS = "checkpoint-*"
CACHE = ".cache"  # packed rows as a trainer maps them into memory
SAVING = ".saving"  # a checkpoint is written below it, then renamed
BEFORE = "before"  # beside a folder that is to replace one of its name: that one, for the moment between two names
PARTS = "parts"  # of a job: rows as they were made, and what they were made from
TRACES = "traces.parquet"  # of a collection: what is kept
TRACES_AS_LINES = "traces.jsonl"
ALL_TRACES = "all/traces.parquet"  # and everything that was scored
CARD = "DATA_CARD.md"
ANSWERS = "answers.parquet"  # of an evaluation
EVALUATION = "evaluation.json"
EVALUATION_PICTURE = "evaluation.png"
REPORT = "report.html"  # of a pipeline
STAGES_READ = "stages_read.json"  # what each of its stages read of earlier ones: names of files and their sums
STAGES = "stages"  # of a preparation: what each of them kept, dropped and counted
TOKENS, PACKED, TOKENIZER = "tokens", "packed", "tokenizer"  # token ids, rows of one length, and what made them
FUNNEL = "funnel.png"  # rows kept by each stage
MODEL_CARD = "README.md"  # of a model that is pushed to a hub
# What trackers leave (runs/dashboard.py); W&B names its folder `wandb` itself.
WANDB, TRACKIO, TENSORBOARD, MLFLOW = "wandb", "trackio", "tensorboard", "mlflow.db"
WANDB_RUN, MLFLOW_RUN = "wandb_run_id", "mlflow_run_id"  # which run a resumed one goes on with
# A run may be continued with other values of these: lengths of the run, logging, saving, devices.
CONTINUABLE = frozenset(
    {
        *("max_steps", "num_train_epochs", "curriculum", "requires", "dry_run", "warmup_run", "restarts"),
        "deterministic",
        *("output_dir", "results_dir", "run_name", "overwrite_output_dir"),
        *("logging_steps", "report_to", "eval_steps", "save_completions_probability"),
        *("save_steps", "save_minutes", "stop_grace_s", "save_total_limit", "save_merged_model"),
        *("per_device_train_batch_size", "logprob_token_budget", "gradient_checkpointing", "offload_untrained_models"),
        *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "use_vllm_server", "vllm_server_base_url"),
        "weight_transfer",
    }
)
# And with other values of these while it is not complete: they say what is made of its samples, or of a pipeline which
# runs it has, whose own folders refuse what changed.
UNTIL_COMPLETE = frozenset(
    {
        *("min_format_rate", "min_reward_quantile", "keep_per_question", "max_student_length"),
        *("near_duplicate_similarity", "select", "select_student_tokens", "compare_with", "pass_at", "stages"),
    }
)
# And a preparation does again whatever stage another value of these concerns.
NOT_OF_A_STAGE = frozenset({"trainer", "sources"})
# What a run reads.
INPUTS = (
    *("model_name_or_path", "student_model", "teacher_model", "dataset_id_or_path", "eval_dataset_id_or_path"),
    *("resume_from", "compare_with"),
)
LOCK = ".lock"  # who holds the folder
MEETING = ".meeting"  # what the first of several machines drew, for the others to see that the folder is theirs too
BEFORE_A_RUN = (f"{CONFIG}.tmp", LOGS, LOCK)  # a rank on another machine may be ahead


def saved_configuration(folder: Path) -> dict | None:
    """What an earlier life of a run here wrote; None where none did, though another's config.yaml may be there."""
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    of_a_run = isinstance(found, dict) and {"trainer", "run_name", "output_dir"} <= found.keys()
    return renamed(found) if of_a_run else None


def run_in(folder: Path) -> dict:
    """The configuration of the run in a folder.

    Raises:
        Refused: the folder holds none.
    """
    config = saved_configuration(folder)
    if config is None:
        raise Refused(f"{folder} holds no run (no {CONFIG} of one)")
    return config


def is_complete(config: dict) -> bool:
    """Whether an earlier life of the run came to the end that is asked for now."""
    marker = Path(config["output_dir"]) / MARKER
    if config["overwrite_output_dir"] or not marker.is_file() or profile_of(config).prepares:
        return False  # a preparation looks at each of its stages
    done = read_json(marker)
    if done is None:  # cut short: what was there before it makes it again
        return False
    if not profile_of(config).trains:
        return True
    if config["max_steps"] > 0:
        return done["steps"] >= config["max_steps"]
    return done["epochs"] >= config["num_train_epochs"]


def mark_complete(folder: Path, done: dict[str, Any]) -> None:
    """Once all else is written: what a run has done."""
    write_whole(folder / MARKER, json.dumps(done))


def check_comparison(config: dict[str, Any]) -> None:
    other = config.get("compare_with")
    if other is not None and read_json(Path(other) / EVALUATION) is None:
        raise Refused(f"compare_with={other} holds no {EVALUATION}: name the output folder of an evaluation")


def check_output(config: dict[str, Any]) -> None:
    """The output folder must be new, or of the same run, and what it is emptied of none of the run's inputs."""
    if config.get("stage") is not None:
        return  # a preparation's report only reads it
    folder = Path(config["output_dir"])
    # Once it has begun it is no longer in need of the checkpoint that it began with.
    begun = any(folder.glob(CHECKPOINTS)) or (folder / SAVING / BEFORE).is_dir()
    if config["resume_from"] is not None and not begun and not Path(config["resume_from"]).is_dir():
        raise Refused(f"resume_from={config['resume_from']} is not a checkpoint folder")
    if folder.exists() and not folder.is_dir():
        raise Refused(f"output_dir={folder} is a file: choose another output_dir")
    before, now = saved_configuration(folder), hide_secrets(config)
    if before is None:
        if folder.is_dir() and any(path.name not in BEFORE_A_RUN for path in folder.iterdir()):
            raise Refused(f"output_dir={folder} holds files that no run here wrote: choose another output_dir")
        return
    if config["overwrite_output_dir"]:
        check_overwriting(config, folder.resolve())
        return
    free = CONTINUABLE if (folder / MARKER).is_file() else CONTINUABLE | UNTIL_COMPLETE
    if profile_of(config).prepares and before.get("trainer") == config["trainer"]:
        free = {*before, *now} - NOT_OF_A_STAGE
    free |= {"resume_from"} if begun and config["resume_from"] is None else frozenset()
    changed = [k for k in sorted({*before, *now} - free) if before.get(k) != now.get(k)]
    if changed:
        key = changed[0]
        raise Refused(
            f"output_dir={config['output_dir']} holds a different run ({key}: {before.get(key)} there, "
            f"{now.get(key)} now): set output_dir, or overwrite_output_dir=true to delete it"
        )


def check_overwriting(config: dict, folder: Path) -> None:
    named = [(key, config.get(key)) for key in INPUTS]
    sources = config.get("sources") or []
    named += [("sources", entry.get("path") if isinstance(entry, dict) else entry) for entry in sources]
    for key, value in named:
        if not isinstance(value, str):
            continue
        place = Path(value).expanduser().resolve()  # of a glob, what it begins with is enough
        inside = place == folder or folder in place.parents
        if inside and (place.exists() or key == "sources"):
            raise Refused(f"overwrite_output_dir=true would delete {key}={value}: choose another output_dir")


def prepare_output(config: dict) -> None:
    """Make the output folder, or empty it when asked to, and write the resolved configuration into it."""
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if config["overwrite_output_dir"] and saved_configuration(folder) is not None:
        # Not the folder itself, which is locked, and last what says that it is a run's.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name in BEFORE_A_RUN:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    shown = {**hide_secrets(config), "overwrite_output_dir": False}
    write_whole(folder / CONFIG, yaml.safe_dump(shown, sort_keys=True))


@contextmanager
def folder_lock(folder: str | Path, key: str = "output_dir") -> Iterator[None]:
    """Hold a folder, which is made where it is missing; whatever ends the process lets go of it. `key` names it.

    It is a file that is locked: on a network file system a folder's lock is one machine's alone.

    Raises:
        Refused: another run holds it, it cannot be made or written to, or it is a file.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK, effective_ids=True):
            raise Refused(f"{key}={folder} cannot be written to: choose another")
        handle = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refused(f"{key}={folder} cannot be made or opened ({error}): choose another") from error
    try:
        _lock(handle, f"{key}={folder}")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, named: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "one that has just begun"
        raise Refused(f"{named} is in use by another run ({holder}): wait for it, or choose another") from None
    except OSError as error:  # a file system may have no locks
        logger.warning("%s cannot be locked (%s): no second run is kept out of it", named, error.strerror)
