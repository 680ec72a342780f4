"""An adapter added to its base: the files of a whole model with its tokenizer."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from rlt.models.loading import load_frozen, load_tokenizer

QUIET = r"Model (with|has) `tie_word_embeddings=True`|fan_in_fan_out is"  # the head is untied below


def merge(adapter: Path, base: str, into: Path) -> Path:
    """A head that is tied to the embedding is untied where the adapter changes it: the embedding stays as it is."""
    model: Any = load_frozen(base, torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and _changes_head(adapter, model):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=QUIET)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(into)
    load_tokenizer(base).save_pretrained(into)
    return into


def _changes_head(adapter: Path, model: Any) -> bool:
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return any(f".{head}." in name for name in file.keys())  # noqa: SIM118
