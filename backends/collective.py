"""Several processes of one run: how they meet, and what accelerate leaves out on a CPU."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from trl.models.utils import _ForwardRedirection


def inside_forward(model, inner, sharded: bool, compute: Callable[[], Any]) -> Any:
    """Run `compute` as part of the forward pass of what is wrapped around `inner`.

    DDP, ZeRO and FSDP gather weights and reduce gradients only for what runs inside a forward pass that they know.
    """
    return _ForwardRedirection()(model, inner, compute) if sharded or inner is not model else compute()


def agree_on_forwards(accelerator) -> Callable[[int], int] | None:
    """For models in shards, whose passes are collective: from this rank's number of them to the largest of all."""
    if not is_sharded(accelerator):
        return None
    return lambda count: int(gather(torch.tensor([count], device=accelerator.device)).max())


def is_sharded(accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def let_fsdp_run_on_cpu() -> None:
    """accelerate takes FSDP for granted on accelerators only, and on a CPU would quietly train with DDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
