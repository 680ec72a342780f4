"""ZeRO-1 to -3: what only DeepSpeed knows of weights and optimizer states that it has flattened and sharded.

DeepSpeed itself is imported where it is asked, which only its own runs do.
"""

import os
from functools import partial
from typing import Any

import torch

from backends.gather import gathered


def engine_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, stage: int, dtype: torch.dtype) -> Any:
    """A model and its optimizer in DeepSpeed's hands, which steps when it is told to."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def is_zero(model: torch.nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine with ZeRO."""
    asks = getattr(model, "zero_optimization", None)
    return callable(asks) and bool(asks())


def is_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A ZeRO-3 parameter, gathered, on the CPU."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True)


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """A whole value into a ZeRO-3 parameter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def training_state(engine, trained: dict[str, torch.nn.Parameter], keep: bool) -> dict[str, Any]:
    """As `backends.state.training_state`, by DeepSpeed's own access to what it has flattened and sharded."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    base = engine.optimizer.optimizer
    step = next((float(state["step"]) for state in base.state.values() if "step" in state), 0.0)
    keys = sorted({key for state in base.state.values() for key, value in state.items() if is_moment(value)})
    if keys:
        link_states(engine.optimizer)
    moments = {
        key: gathered(trained.items(), partial(safe_get_full_optimizer_state, optim_state_key=key), keep)
        for key in keys
    }
    return {
        "weights": gathered(trained.items(), safe_get_full_fp32_param, keep),
        "optimizer": {
            name: {"step": torch.tensor(step), **{key: moments[key][name] for key in keys}} if keys else {}
            for name in (trained if keep else ())
        },
    }


def load_training_state(engine, trained: dict[str, torch.nn.Parameter], state: dict[str, Any]) -> None:
    """The reverse of `training_state`; the weights of forward passes are loaded already."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    load_masters(trained, state["weights"])
    zero = engine.optimizer
    shards = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    moments = next(filter(None, state["optimizer"].values()), None)
    if moments is None:
        forget_states(zero)
        return
    step = moments["step"]
    for shard in shards:  # DeepSpeed makes them in the first step, which is behind
        zero.optimizer.state[shard] = {
            # A fused optimizer reads it on the device.
            "step": step.to(shard.device, copy=True) if isinstance(zero.optimizer, torch.optim.AdamW) else int(step),
            **{key: torch.zeros_like(shard) for key, value in moments.items() if key != "step"},
        }
    link_states(zero)
    for name, parameter in trained.items():
        set_state = safe_set_local_optimizer_state if is_zero3(parameter) else safe_set_full_optimizer_state
        for key, value in state["optimizer"].get(name, {}).items():
            if key != "step":
                set_state(parameter, own_part(parameter, value), key)


def load_masters(trained: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Weights that the optimizer steps, of which those of forward passes are copies."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name in trained.keys() & weights.keys():
        parameter = trained[name]
        set_weight = safe_set_local_fp32_param if is_zero3(parameter) else safe_set_full_fp32_param
        set_weight(parameter, own_part(parameter, weights[name]))


def forget_states(zero) -> None:
    """The optimizer begins anew; its states are linked to parameters in its first step."""
    zero.optimizer.state.clear()
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False


def own_part(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What DeepSpeed takes of a whole value: under ZeRO-3 this rank's part, else all of it."""
    return partition(parameter, value) if is_zero3(parameter) else value.to(parameter.device)


def link_states(zero) -> None:
    """DeepSpeed 0.19.8 links states to parameters in the first step of the first group, when others have none yet."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def partition(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a ZeRO-3 parameter's value; the last one is filled up with zeros."""
    size, rank = parameter.partition_numel(), torch.distributed.get_rank()
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - len(mine))).to(parameter.device)


def is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def add_gradients(engine, loss: torch.Tensor, last: bool) -> None:
    """A backward pass; `engine.step()` is left to the caller."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)


def give_up_gradients(engine) -> None:
    """The engine is as after a step, or before its first backward pass; passes that were begun had come to their end.

    ZeRO-3 overwrites its gradients in the first backward pass after `zero_grad`. ZeRO-1 and -2 keep what they have
    added up until their step, which forgets it in these lines of `DeepSpeedZeroOptimizer.step`.
    """
    zero = engine.optimizer
    if hasattr(zero, "all_grad_tensors"):
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero._release_preflattened_grad_buffers()
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            sums.update(dict.fromkeys(sums))
    zero.zero_grad(set_to_none=True)
