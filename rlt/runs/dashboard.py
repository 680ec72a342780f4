"""A run as its trackers show it: its name, its question, and where their files lie: all of them in its output folder.

What a trainer logs goes through the callbacks of transformers, which read the environment that is set here;
`log_figures` is for jobs that have no trainer. Nothing here needs a network, unless a user's own variables name a
server.
"""

import contextlib
import importlib
import json
import logging
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlt.durable import write_whole
from rlt.errors import Refused
from rlt.places import CFGS
from rlt.runs.folder import MLFLOW, MLFLOW_RUN, TENSORBOARD, TRACKIO, WANDB, WANDB_RUN
from rlt.runs.hidden import hide_secrets, is_secret
from rlt.runs.reach import why_unreachable
from rlt.runs.trackers import trackers_of
from rlt.schema import profile_of

PROJECT = "rlt"

logger = logging.getLogger("rlt")


def run_title(config: dict[str, Any]) -> str:
    """The run's name, with its folder below `results_dir` where that is another: a sweep's runs share a name."""
    name, folder, results = config["run_name"], Path(config["output_dir"]), Path(config["results_dir"])
    if not folder.is_relative_to(results) or (below := str(folder.relative_to(results))) == name:
        return name
    return f"{name} ({below})"


def run_question(config: dict[str, Any]) -> str:
    """What a run is for, as its run file says, and what it measures."""
    return f"{_run_file_says(config)} Measured: {_measured(config)}."


def _run_file_says(config: dict[str, Any]) -> str:
    """The comment below the command at the head of a run file, up to an empty line of it."""
    file = CFGS / "run_cfg" / f"{config['run_name']}.yaml"
    if not file.is_file():
        return f"A {config['trainer']} run under a name of its own."
    comments = []
    for line in file.read_text(encoding="utf-8").splitlines()[2:]:
        if not line.startswith("# "):
            break
        comments.append(line.removeprefix("# "))
    return " ".join(comments)


def _measured(config: dict[str, Any]) -> str:
    profile, held_out = profile_of(config), config.get("eval_size")
    if profile.asks:
        return f"average@{config['samples_per_question']}, pass@k and the format rate, with 95 % intervals"
    if profile.prepares:
        return "rows kept by each stage"
    if not profile.trains:
        return "each stage's own figures" if profile.stages else "reward and format rate of the traces"
    if profile.learns_from == "text":
        return "loss on held-out rows of each source, beside the entropy of unigrams; tokens per second"
    if not held_out or not profile.holds_out:
        return "reward in training" if profile.generates and not profile.distils else "the loss on its training rows"
    if profile.generates:
        answers = config["num_generations_eval"] or config["num_generations"]
        what = "accuracy" if profile.distils else "reward"
        return f"{what} on {held_out} held-out questions x {answers}, paired with the start, with a 95 % interval"
    return f"loss on {held_out} held-out rows"


def prepare_dashboards(config: dict[str, Any]) -> None:
    """Set what the trackers of a run read from the environment; a resumed run goes on where it left off.

    What a user has set in the environment stays, but for what makes a run the same run again.
    """
    for name in trackers_of(config):
        PREPARATIONS[name](config, Path(config["output_dir"]))


def _prepare_wandb(config: dict[str, Any], folder: Path) -> None:
    """Offline unless logged in and W&B answers: its own library tries for minutes, and then ends the run."""
    id_file = folder / WANDB_RUN
    if not id_file.is_file():
        write_whole(id_file, os.urandom(4).hex())
    if "WANDB_MODE" not in os.environ:
        os.environ["WANDB_MODE"] = _wandb_mode(folder)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_NOTES", run_question(config))
    if any(is_secret(argument) for argument in sys.argv):
        os.environ["WANDB__DISABLE_META"] = "true"  # the machine's description, which has the command line in it
    os.environ |= {
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": id_file.read_text(encoding="utf-8").strip(),
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
    }


def has_wandb_login(server: str) -> bool:
    """Whether there is a key, or an entry in ~/.netrc for W&B's server or one that is called after it."""
    try:
        machines = netrc.netrc(_netrc_file()).hosts
    except (OSError, netrc.NetrcParseError):  # there is none, or none that W&B could read
        machines = {}
    named = urlsplit(server).netloc in machines or any("wandb" in machine for machine in machines)
    return named or bool(os.environ.get("WANDB_API_KEY"))


def _netrc_file() -> Path:
    return Path(os.environ.get("NETRC", "~/.netrc")).expanduser()


def _wandb_mode(folder: Path) -> str:
    if not os.environ.get("WANDB_API_KEY") and not _netrc_file().is_file():
        return "offline"  # without W&B's import, which takes seconds
    server = _wandb_server()
    if not has_wandb_login(server):
        return "offline"
    reason = why_unreachable(server)
    if reason is None:
        return "online"
    logger.warning(
        "W&B at %s cannot be reached (%s): this run is logged offline, in %s; `wandb sync` sends it later",
        server,
        reason,
        folder / WANDB,
    )
    return "offline"


def _wandb_server() -> str:
    """By W&B's own settings files and variables; `wandb.setup` would keep what it reads, before the rest is set."""
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings()
    try:
        settings.update_from_system_settings()
        settings.update_from_env_vars(dict(os.environ))
    except ValueError as error:
        raise Refused(f"report_to=wandb: W&B's settings cannot be read ({' '.join(str(error).split())})") from error
    return settings.base_url


def _prepare_trackio(config: dict[str, Any], folder: Path) -> None:
    os.environ.setdefault("TRACKIO_DIR", str((folder / TRACKIO).absolute()))


def _prepare_tensorboard(config: dict[str, Any], folder: Path) -> None:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD)


def _prepare_mlflow(config: dict[str, Any], folder: Path) -> None:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / MLFLOW).absolute()}")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    os.environ.setdefault("MLFLOW_TAGS", json.dumps({"mlflow.note.content": run_question(config)}))
    if (id_file := folder / MLFLOW_RUN).is_file():
        os.environ["MLFLOW_RUN_ID"] = id_file.read_text(encoding="utf-8").strip()


def log_figures(config: dict[str, Any], figures: dict[str, float]) -> None:
    """The result of a job, in every tracker of a run that `prepare_dashboards` has prepared."""
    for name in trackers_of(config):
        LOGGERS[name](config, figures)


def _log_to_wandb(config: dict[str, Any], figures: dict[str, float]) -> None:
    wandb = importlib.import_module("wandb")
    with wandb.init(name=run_title(config), config=hide_secrets(config)) as run:
        run.log(figures)


def _log_to_trackio(config: dict[str, Any], figures: dict[str, float]) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for a run's result
        trackio = importlib.import_module("trackio")
        settings = {**hide_secrets(config), "question": run_question(config)}
        trackio.init(project=PROJECT, name=run_title(config), config=settings, resume="allow")
        trackio.log(figures)
        trackio.finish()


def _log_to_tensorboard(config: dict[str, Any], figures: dict[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
        writer.add_text("question", run_question(config))
        for name, value in figures.items():
            writer.add_scalar(name, value)


def _log_to_mlflow(config: dict[str, Any], figures: dict[str, float]) -> None:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
    with mlflow.start_run(run_name=run_title(config)):
        mlflow.set_tags(json.loads(os.environ["MLFLOW_TAGS"]))
        mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in figures.items()})


PREPARATIONS = {
    "wandb": _prepare_wandb,
    "trackio": _prepare_trackio,
    "tensorboard": _prepare_tensorboard,
    "mlflow": _prepare_mlflow,
}
LOGGERS = {
    "wandb": _log_to_wandb,
    "trackio": _log_to_trackio,
    "tensorboard": _log_to_tensorboard,
    "mlflow": _log_to_mlflow,
}
