"""Weights and optimizer states of a model that may be in shards: gathered whole, by parameter name, and put back.

What is kept so continues on any number of processes and under any sharding: one process, DDP, ZeRO-1 to -3, FSDP2.
Every function is collective: all ranks call it, with the same model.
"""

from typing import Any

import torch

from backends import deepspeed, fsdp2
from backends.gather import Tensors, gathered


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """What DDP or a DeepSpeed engine is wrapped around; FSDP2 wraps nothing."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, torch.nn.Module)
    return inner


def full_weights(model: torch.nn.Module, keep: bool = True) -> Tensors:
    """All parameters on the CPU; not copies, where they are whole and there already.

    Args:
        keep: on this rank; the others only take part in gathering, and get nothing.
    """
    return gathered(inner_model(model).named_parameters(), _whole, keep)


@torch.no_grad()
def load_full_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """The reverse of `full_weights`; parameters that are not named keep their values."""
    for name, parameter in inner_model(model).named_parameters():
        if name in weights:
            _put(parameter, weights[name])


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Weights to train from, also where the optimizer has its own copy of them."""
    load_full_weights(model, weights)
    if deepspeed.is_zero(model):
        deepspeed.load_masters(_trained(model), weights)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Of all shards together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU."""
    if deepspeed.is_zero3(tensor):
        return deepspeed.whole(tensor)
    return fsdp2.whole(tensor).detach().cpu()


def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if deepspeed.is_zero3(parameter):
        deepspeed.put(parameter, value)
    else:
        parameter.copy_(fsdp2.like(parameter, value))


def training_state(model: torch.nn.Module, optimizer, keep: bool = True) -> dict[str, Any]:
    """Trained weights in the optimizer's precision, and the optimizer's states, both by parameter name.

    Args:
        model: as the trainer wrapped it.
        optimizer: its optimizer; under ZeRO, DeepSpeed's.
        keep: on this rank, as in `full_weights`.
    """
    trained = _trained(model)
    if deepspeed.is_zero(model):
        return deepspeed.training_state(model, trained, keep)
    states = _torch_optimizer(optimizer).state
    kept = {}
    for name, parameter in trained.items():
        values = states.get(parameter, {})
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        whole = gathered(tensors.items(), _whole, keep)
        kept[name] = {**values, **whole} if keep else {}
    return {"weights": gathered(trained.items(), _whole, keep), "optimizer": kept}


@torch.no_grad()
def load_training_state(model: torch.nn.Module, optimizer, state: dict[str, Any]) -> None:
    """The reverse of `training_state`, under this sharding."""
    trained = _trained(model)
    load_full_weights(model, state["weights"])
    if deepspeed.is_zero(model):
        deepspeed.load_training_state(model, trained, state)
        return
    inner = _torch_optimizer(optimizer)
    names = {parameter: name for name, parameter in trained.items()}
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    kept = {
        index: {
            key: fsdp2.like(parameter, value) if isinstance(value, torch.Tensor) else value
            for key, value in state["optimizer"][names[parameter]].items()
        }
        for index, parameter in enumerate(parameters)
        if state["optimizer"].get(names[parameter])
    }
    inner.load_state_dict({**inner.state_dict(), "state": kept})


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in inner_model(model).named_parameters() if p.requires_grad}


def _torch_optimizer(optimizer) -> torch.optim.Optimizer:
    """Inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
