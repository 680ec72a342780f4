"""Which linear layers of a model an adapter is put on: those of its attention, of its MLPs, and its output head.

By the names of what a layer is inside of, which transformers' models agree on better than on the layers' own.
"""

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from rlt.errors import Refused
from rlt.models.recurrent import past_adapters

INSIDE = {"attn": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "expert")}
ROUTERS = ("gate", "router")  # of experts


def layers_by_part(model: Any) -> dict[str, list[str]]:
    """Names of linear layers: `attn`, `mlp`, `unembed`."""
    head, skipped = model.get_output_embeddings(), set(past_adapters(model))
    found: dict[str, list[str]] = {"attn": [], "mlp": [], "unembed": []}
    for name, module in model.named_modules():
        if module is head:
            found["unembed"].append(name)
        elif isinstance(module, torch.nn.Linear | Conv1D) and name not in skipped:
            *above, own = name.split(".")
            part = _part(above)
            if part is not None and own not in ROUTERS:
                found[part].append(name)
    return found


def _part(above: list[str]) -> str | None:
    """Of the innermost module that says it."""
    for outer in reversed(above):
        for part, words in INSIDE.items():
            if any(word in outer for word in words):
                return part
    return None


def wanted_layers(layers: dict[str, list[str]], wanted: dict[str, bool]) -> list[str]:
    """
    Raises:
        Refused: nothing is wanted, or a part that the model does not have in linear layers.
    """
    if not any(wanted.values()):
        raise Refused(f"nothing to train: one of {', '.join(f'train_{part}' for part in wanted)} must be true")
    for part, asked in wanted.items():
        if asked and not layers[part]:
            raise Refused(f"train_{part}=true: the model has no linear layers there that an adapter could be put on")
    return [name for part, asked in wanted.items() if asked for name in layers[part]]
