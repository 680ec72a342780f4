"""Where a model is loaded from: an embedded model from the cache, a folder or a hub name as it is, an adapter's folder
from the model that adapter and base make together. The weights in a folder decide which it is, not the settings beside
them. Nothing heavy is imported before an adapter is merged."""

import json
import logging
import os
import shutil
from hashlib import sha256
from pathlib import Path

from rlt.durable import flush_all, read_json, rename
from rlt.errors import Refused
from rlt.models.embedded import CACHE_REMEDY, cache_folder, embedded_model_path, is_embedded, locked
from rlt.models.files import is_whole
from rlt.places import LOCAL_STARTS, looked_in

MERGED = "merged"
WHOLE = "whole"  # in the cache: folders of links
MADE_FROM = "made_from.json"  # in it: the adapter's files and their sums

logger = logging.getLogger("rlt")


def resolve_model_path(name: str) -> str:
    """Where to load a model from; for an adapter's folder, `merged_model_path`.

    Raises:
        Refused: a path that does not exist, an unknown embedded model, or for the reasons of `merged_model_path` and
            `whole_model_path`.
    """
    if is_embedded(name):
        return str(embedded_model_path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(merged_model_path(path) if is_adapter(path) else whole_model_path(path))
    if name.startswith(LOCAL_STARTS):
        raise Refused(f"model path {name} does not exist{looked_in(name)}")
    return name


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter's weights and none of a whole model, whatever settings lie beside them."""
    if not (folder / "adapter_config.json").is_file():
        return False
    whole = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model.")]
    return not whole and not (folder / "pytorch_model.bin").is_file()


def whole_model_path(folder: Path) -> Path:
    """A whole model's folder as it is; where an adapter's files are left in it, links to the others, in the cache:
    transformers would put that adapter on weights which have it already, or look for one that is gone.

    Raises:
        Refused: the cache cannot be written to.
        TimeoutError: another process has held the lock for 10 minutes.
    """
    if not (folder / "adapter_config.json").is_file():
        return folder
    if any(folder.glob("adapter_model.*")):
        logger.warning("%s has the weights of a whole model and of an adapter: the adapter is left out", folder)
    own = {path.name: path.absolute() for path in folder.iterdir() if not path.name.startswith("adapter_")}
    linked = cache_folder() / WHOLE / sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    try:
        linked.mkdir(parents=True, exist_ok=True)
        with locked(linked.with_suffix(".lock")):
            for path in linked.iterdir():
                if path.name not in own:
                    path.unlink()
            for name, path in own.items():
                if not (linked / name).is_symlink():
                    (linked / name).symlink_to(path)
    except OSError as error:
        raise Refused(f"{linked} cannot be made, for {folder} without its adapter ({error}): {CACHE_REMEDY}") from error
    return linked


def adapter_base(folder: Path) -> str:
    """The name of the model that a folder's adapter belongs to.

    Raises:
        Refused: it names none, or its weights are missing.
    """
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not base or not isinstance(base, str):
        raise Refused(f"{folder}/adapter_config.json names no base model (base_model_name_or_path)")
    if not any(folder.glob("adapter_model.*")):
        raise Refused(f"{folder} has an adapter's settings and no weights of it (adapter_model.safetensors)")
    if Path(base).expanduser().absolute() == folder.absolute():
        raise Refused(f"{folder}/adapter_config.json names its own folder as base")
    return base


def merged_model_path(folder: Path, trust_remote_code: bool = False) -> Path:
    """`folder`/merged: the base of the folder's adapter with the adapter added, in the base's precision.

    Written once, and again when the adapter is another; several processes may ask at once. It is complete or absent.

    Raises:
        Refused: the folder cannot be written to, the base cannot be loaded, or the adapter does not fit it.
        TimeoutError: another process has held the lock for 10 minutes.
    """
    merged = folder / MERGED
    if not _is_of(merged, adapter := _adapter_sums(folder)):
        if not os.access(folder, os.W_OK):
            raise Refused(f"{folder} has an adapter alone, and its merged model cannot be written there: copy it")
        with locked(folder / f"{MERGED}.lock"):
            if not _is_of(merged, adapter):
                aside = folder / f"{MERGED}.partial"
                shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: whoever writes has the lock
                _merge(folder, aside, trust_remote_code)
                (aside / MADE_FROM).write_text(json.dumps(adapter), encoding="utf-8")
                flush_all(aside)
                shutil.rmtree(merged, ignore_errors=True)
                rename(aside, merged)
    return merged


def _adapter_sums(folder: Path) -> dict[str, str]:
    """By the content of an adapter's files: their times are a copy's, or those of a machine whose clock is behind."""
    files = sorted([*folder.glob("adapter_model.*"), folder / "adapter_config.json"])
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def _is_of(merged: Path, adapter: dict[str, str]) -> bool:
    """Whether it was made from this adapter, and is as it was written: else it is made anew."""
    return read_json(merged / MADE_FROM) == adapter and is_whole(merged)


def _merge(folder: Path, into: Path, trust_remote_code: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlt.models.loading import told

    base = resolve_model_path(adapter_base(folder))
    model = told(
        AutoModelForCausalLM.from_pretrained,
        base,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    _put_on(model, folder, base).merge_and_unload().save_pretrained(into)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    told(AutoTokenizer.from_pretrained, own, trust_remote_code=trust_remote_code).save_pretrained(into)


def _put_on(model, folder: Path, base: str):
    """The base with the folder's adapter: peft only warns where an adapter lacks weights, or has others."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    try:
        adapted = PeftModel.from_pretrained(model, folder)
        written = load_peft_weights(str(folder), device="cpu")
    except OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        raise Refused(f"{folder}: its adapter cannot be put on its base, {base} ({reason})") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    unmatched = sorted(name for name in wanted.keys() ^ written.keys() if "lora_" in name)
    if unmatched:
        raise Refused(f"{folder}: its adapter is not one of its base, {base} (for one, {unmatched[0]})")
    return adapted
