"""An adapter that travels alone: its factors go to the servers, which add them to the base model's weights they have.

In the notation of LoRA (arXiv 2106.09685): W = W_0 + s B A, with A (r, in), B (out, r); s is sent as part of B.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import snapshot_download
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from backends.fsdp2 import whole
from rlt.errors import Refused

A, B = ".lora_A", ".lora_B"


def travels_alone(policy) -> bool:
    """Whether a policy is plain weights, as its folder or the hub has them, and plain LoRA on linear layers."""
    if not is_peft_model(policy) or getattr(policy.get_base_model(), "is_quantized", False):
        return False
    config = policy.peft_config["default"]
    plain = config.bias == "none" and not config.modules_to_save and not config.use_dora
    adapted = [module for module in policy.get_base_model().modules() if isinstance(module, BaseTunerLayer)]
    return plain and all(isinstance(module, Linear) and not module.fan_in_fan_out for module in adapted)


def adapter_tensors(
    policy, gather: Callable[[list[torch.Tensor]], AbstractContextManager]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors of each adapted layer, by its name in the base model; on all ranks, where they are in shards.

    Args:
        gather: makes shards of ZeRO-3 whole within its block.
    """
    modules: dict[str, Any] = dict(policy.get_base_model().named_modules())
    for name, module in modules.items():
        if not isinstance(module, BaseTunerLayer):
            continue
        lora: Any = module
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        with gather([a, b]):
            yield f"{name}{A}", whole(a.detach()).float()
            yield f"{name}{B}", whole(b.detach()).float() * lora.scaling["default"]


def adapted_weights(model: str, factors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a base model, with an adapter added, from its safetensors files; rounded once.

    Args:
        model: a folder or a hub name.
        factors: as `adapter_tensors` gave them.

    Raises:
        Refused: the model's files hold no weights, or none for some factor.
    """
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns="*.safetensors*"))
    names: set[str] = set()
    embedding, left = None, set(factors)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dictionary)
                value = weights.get_tensor(name)
                layer = name.removesuffix(".weight")
                if f"{layer}{A}" in factors:
                    left -= {f"{layer}{A}", f"{layer}{B}"}
                    value = (value.float() + factors[f"{layer}{B}"] @ factors[f"{layer}{A}"]).to(value.dtype)
                names.add(name)
                embedding = value if name.endswith("embed_tokens.weight") else embedding
                yield name, value
    if left or not names:
        raise Refused(f"{model} is not the base of this adapter: no weights for {sorted(left)[:1] or 'any layer'}")
    if "lm_head.weight" not in names and embedding is not None:  # tied
        yield "lm_head.weight", embedding
