"""The figures of jobs that have no trainer to log them, as a W&B run."""

import os
from pathlib import Path
from typing import Any

from rlt.runs.folder import hide_secrets


def log_figures(config: dict[str, Any], figures: dict[str, float]) -> None:
    """One step of a run whose environment `train.prepare_wandb` has set; nothing unless `report_to` is wandb."""
    if config["report_to"] != "wandb":
        return
    import wandb

    with wandb.init(name=config["run_name"], config=hide_secrets(config)) as run:
        run.log(figures)


def prepare_wandb(config: dict) -> None:
    """Offline unless logged in, and the same W&B run after a resume."""
    if config["report_to"] != "wandb":
        return
    folder = Path(config["output_dir"])
    id_file = folder / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    os.environ.setdefault("WANDB_MODE", "online" if logged_in else "offline")
    os.environ.setdefault("WANDB_PROJECT", "rlt")
    os.environ |= {
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": id_file.read_text().strip(),
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
    }
