"""The figures of jobs that have no trainer to log them, as a W&B run."""

from typing import Any

from plan import hide_secrets


def log_figures(config: dict[str, Any], figures: dict[str, float]) -> None:
    """One step of a run whose environment `train.prepare_wandb` has set; nothing unless `report_to` is wandb."""
    if config["report_to"] != "wandb":
        return
    import wandb

    with wandb.init(name=config["run_name"], config=hide_secrets(config)) as run:
        run.log(figures)
