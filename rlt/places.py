"""Where the repository's folders are, how local paths begin, and the names of its environment variables."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CFGS = ROOT / "cfgs"
ACCELERATE_CONFIGS = ROOT / "accelerate_configs"
LOCAL_STARTS = (".", "/", "~", "results/")  # of names that are paths here, whether they exist or not
KEY_VARIABLE = "RLT_SERVER_KEY"  # what generation servers ask for
API_KEY_VARIABLE = "RLT_API_KEY"  # what clients of the training API send: one key, or tenant=key,tenant=key
SECRETS_VARIABLE = "RLT_SECRET_OVERRIDES"  # what a run started by another does not show in its command line
RANK_SECRETS_VARIABLE = "RLT_RANK_SECRETS"  # values that the file of a rank's plan has not, as JSON
TRANSFER_VARIABLE = "RLT_WEIGHT_TRANSFER"  # by what a generation server takes weights
WEIGHTS_VARIABLE = "RLT_WEIGHTS_FOLDER"  # where rank 0 packs weights for servers, made and removed by its launcher
PREPARED = "prepared"  # below the output folder of a preparation: the rows that other runs read
MARKER = "COMPLETE"  # in the output folder of a run, written last: what was done


def looked_in(path: str) -> str:
    """What follows on `PATH does not exist`: a relative one is looked for in the project's folder, mostly."""
    return "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}"
