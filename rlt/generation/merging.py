"""A policy's weights with its adapter added, for an engine that has no adapters.

In the notation of LoRA (arXiv 2106.09685) W = W_0 + s B A is made anew at every sync, and W_0 is not touched. PEFT's
own `merge_adapter` adds into W_0 and takes out again; in floating point W_0 + d - d is not W_0, which is the reference,
is in no checkpoint, and would be another after every step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer

from backends.fsdp2 import whole

QUANTISED = (Linear4bit, Linear8bitLt)
UNITS = 1024  # inputs of a layer whose weights are asked for at once


@torch.no_grad()
def merged_params(
    policy, gather: Callable[[list], AbstractContextManager] = lambda _: nullcontext()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of an adapter's base model with the adapter added; nothing is changed.

    Args:
        policy: a PEFT model with LoRA on layers that hold one weight; its base may be quantised or in shards.
        gather: makes shards of ZeRO-3 whole within its block; all ranks iterate together.

    Yields:
        The sums in the base's precision, rounded once; of quantised layers in float32.
    """
    base = policy.get_base_model()
    modules: dict[str, Any] = dict(base.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    layers: dict[str, Any] = dict(adapted)
    for name, module in modules.items():
        if isinstance(module, QUANTISED) and not _is_inside(name, adapted):
            layers[name] = module
    for name, module in layers.items():
        with gather(list(module.parameters())):
            yield from _merged_layer(name, module)
    for name, param in base.named_parameters():
        if not _is_inside(name, layers):
            with gather([param]):
                yield name, whole(param.detach())


def _merged_layer(name: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    adapters = getattr(module, "active_adapters", ())  # none on a quantised layer without one
    layer: Any = module.get_base_layer() if adapters else module
    weight = _what_it_multiplies_by(layer) if isinstance(layer, QUANTISED) else layer.weight.detach()
    deltas = [module.get_delta_weight(adapter) for adapter in adapters]
    finest = torch.promote_types(weight.dtype, torch.float32)
    merged = sum((delta.to(finest) for delta in deltas), weight.to(finest)).to(weight.dtype) if deltas else weight
    yield f"{name}.weight", whole(merged)
    if getattr(layer, "bias", None) is not None:
        yield f"{name}.bias", whole(layer.bias.detach())


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _what_it_multiplies_by(layer: torch.nn.Linear) -> torch.Tensor:
    """A linear layer's weight as its products have it in training, whatever form it is kept in.

    In evaluation bitsandbytes may round the inputs as well (8 bit, on a CPU): the engine's weights would depend on
    whether an evaluation came before.
    """
    size, device = layer.in_features, layer.weight.device
    weights: Any = layer  # whose type denies that a bias may be missing
    bias, weights.bias = layer.bias, None  # which would be added, and rounded, in the products' precision
    training, layer.training = layer.training, True
    try:
        inputs = torch.arange(size, device=device).split(UNITS)
        return torch.cat([layer(torch.nn.functional.one_hot(rows, size).float()) for rows in inputs]).T
    finally:
        weights.bias, layer.training = bias, training
