"""Weights and optimizer states of a model that may be in shards: gathered whole, by parameter name, and put back.

What is kept so continues on any number of processes and under any sharding: one process, DDP, ZeRO-1 to -3, FSDP2.
Every function is collective: all ranks call it, with the same model.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

Tensors = dict[str, torch.Tensor]


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """What DDP or a DeepSpeed engine is wrapped around; FSDP2 wraps nothing."""
    return getattr(model, "module", model)


def full_weights(model: torch.nn.Module, keep: bool = True) -> Tensors:
    """All parameters on the CPU; not copies, where they are whole and there already.

    Args:
        keep: on this rank; the others only take part in gathering, and get nothing.
    """
    return _gathered(inner_model(model).named_parameters(), _whole, keep)


def _gathered(named: Iterable[tuple[str, torch.Tensor]], gather: Callable, keep: bool) -> Tensors:
    found = {}
    for name, tensor in named:
        whole = gather(tensor)
        if keep:
            found[name] = whole.cpu()
    return found


@torch.no_grad()
def load_full_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """The reverse of `full_weights`; parameters that are not named keep their values."""
    for name, parameter in inner_model(model).named_parameters():
        if name in weights:
            _put(parameter, weights[name])


def _is_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU."""
    if _is_zero3(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if _is_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.copy_(_like(parameter, value))


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value in the shards of a parameter."""
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def training_state(model: torch.nn.Module, optimizer, keep: bool = True) -> dict[str, Any]:
    """Trained weights in the optimizer's precision, and the optimizer's states, both by parameter name.

    Args:
        model: as the trainer wrapped it.
        optimizer: its optimizer; under ZeRO, DeepSpeed's.
        keep: on this rank, as in `full_weights`.
    """
    trained = _trained(model)
    if _is_zero(model):
        return _zero_state(model, trained, keep)
    states = _torch_optimizer(optimizer).state
    kept = {}
    for name, parameter in trained.items():
        values = states.get(parameter, {})
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        whole = _gathered(tensors.items(), _whole, keep)
        kept[name] = {**values, **whole} if keep else {}
    return {"weights": _gathered(trained.items(), _whole, keep), "optimizer": kept}


def _zero_state(engine, trained: dict[str, torch.nn.Parameter], keep: bool) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_states(engine.optimizer)
    base = engine.optimizer.optimizer
    step = next((float(state["step"]) for state in base.state.values() if "step" in state), 0.0)
    keys = sorted({key for state in base.state.values() for key, value in state.items() if _is_moment(value)})
    moments = {
        key: _gathered(trained.items(), partial(safe_get_full_optimizer_state, optim_state_key=key), keep)
        for key in keys
    }
    return {
        "weights": _gathered(trained.items(), safe_get_full_fp32_param, keep),
        "optimizer": {
            name: {"step": torch.tensor(step), **{key: moments[key][name] for key in keys}}
            for name in (trained if keep else ())
        },
    }


@torch.no_grad()
def load_training_state(model: torch.nn.Module, optimizer, state: dict[str, Any]) -> None:
    """The reverse of `training_state`, under this sharding."""
    trained = _trained(model)
    load_full_weights(model, state["weights"])
    if _is_zero(model):
        _load_zero(model, trained, state)
        return
    inner = _torch_optimizer(optimizer)
    names = {parameter: name for name, parameter in trained.items()}
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    kept = {
        index: {
            key: _like(parameter, value) if isinstance(value, torch.Tensor) else value
            for key, value in state["optimizer"][names[parameter]].items()
        }
        for index, parameter in enumerate(parameters)
        if state["optimizer"].get(names[parameter])
    }
    inner.load_state_dict({**inner.state_dict(), "state": kept})


def _load_zero(engine, trained: dict[str, torch.nn.Parameter], state: dict[str, Any]) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    zero = engine.optimizer
    shards = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    moments = next(iter(state["optimizer"].values()))
    step = moments["step"]
    for shard in shards:  # DeepSpeed makes them in the first step, which is behind
        zero.optimizer.state[shard] = {
            # A fused optimizer reads it on the device.
            "step": step.to(shard.device, copy=True) if isinstance(zero.optimizer, torch.optim.AdamW) else int(step),
            **{key: torch.zeros_like(shard) for key, value in moments.items() if key != "step"},
        }
    _link_states(zero)
    for name, parameter in trained.items():
        zero3 = _is_zero3(parameter)
        set_weight = safe_set_local_fp32_param if zero3 else safe_set_full_fp32_param
        set_state = safe_set_local_optimizer_state if zero3 else safe_set_full_optimizer_state
        part = partial(_partition, parameter) if zero3 else partial(torch.Tensor.to, device=parameter.device)
        set_weight(parameter, part(state["weights"][name]))
        for key, value in state["optimizer"][name].items():
            if key != "step":
                set_state(parameter, part(value), key)


def _link_states(zero) -> None:
    """DeepSpeed 0.19.8 links states to parameters in the first step of the first group, when others have none yet."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _partition(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a ZeRO-3 parameter's value; the last one is filled up with zeros."""
    size, rank = parameter.partition_numel(), torch.distributed.get_rank()
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - len(mine))).to(parameter.device)


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in inner_model(model).named_parameters() if p.requires_grad}


def _is_zero(model: torch.nn.Module) -> bool:
    return hasattr(model, "zero_optimization") and model.zero_optimization()


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _torch_optimizer(optimizer) -> torch.optim.Optimizer:
    """Inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
