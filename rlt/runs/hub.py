"""`push_to_hub`: the repository is made before a run trains, and the finished model is pushed as one commit.

transformers' own pushes are off. They upload the whole output folder at every checkpoint, which others may be writing
to, and with it the trackers' files and `training_args.bin`, which holds the token.
"""

from pathlib import Path
from typing import Any

from rlt.errors import Refused
from rlt.runs.folder import COMPLETIONS, LOGS, MARKER, MLFLOW, MLFLOW_RUN, PARTS, TENSORBOARD, TRACKIO, WANDB, WANDB_RUN

# Of an output folder, what is the run's own business; the rest is its model, configuration, metrics and evaluations.
KEPT_BACK = (
    *("checkpoint-*", "damaged-*", ".*", "*.tmp", "*.lock", "*.partial/*", "training_args.bin", MARKER, f"{MLFLOW}*"),
    *(f"{folder}/*" for folder in (LOGS, COMPLETIONS, PARTS, WANDB, TRACKIO, TENSORBOARD)),
    *(WANDB_RUN, MLFLOW_RUN),
)
ANSWERS_WITHIN_S = 30
LOG_IN = "log in with `hf auth login`, or set hub_token to one that may write there"


def make_repository(config: dict[str, Any]) -> str | None:
    """The repository of a run that is to be pushed, made where it is missing, before hours of training.

    Returns:
        its name with its owner; None for a run that is not pushed.

    Raises:
        Refused: the hub does not answer, or does not let this user in.
    """
    if not config.get("push_to_hub"):
        return None
    from httpx import HTTPError, head
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    name = config.get("hub_model_id") or Path(config["output_dir"]).absolute().name
    api = HfApi(token=config.get("hub_token"))
    try:
        head(api.endpoint, timeout=ANSWERS_WITHIN_S)  # the hub's own client waits without end
        return api.create_repo(name, private=config.get("hub_private_repo"), exist_ok=True).repo_id
    except HFValidationError as error:
        raise Refused(f"hub_model_id={name}: {_in_one_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise Refused(
            f"push_to_hub=true: {name} cannot be made on {api.endpoint} ({_in_one_line(error)}): {LOG_IN}"
        ) from error


def push(config: dict[str, Any], repository: str) -> str:
    """Push what a finished run leaves but for `KEPT_BACK`, as one commit.

    Returns:
        where it is.

    Raises:
        Refused: the hub did not take it; the model is in the output folder all the same.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    folder = config["output_dir"]
    api = HfApi(token=config.get("hub_token"))
    try:
        pushed = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"{config['run_name']}",
            ignore_patterns=list(KEPT_BACK),
            revision=config.get("hub_revision"),
        )
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: an upload of one of its threads
        raise Refused(
            f"push_to_hub=true: {repository} was not pushed to {api.endpoint} ({_in_one_line(error)}); the model is in "
            f"{folder}, and the same command tries again"
        ) from error
    return str(pushed.repo_url)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
