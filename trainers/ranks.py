"""Several processes of one run: how they meet, and what accelerate leaves out on a CPU."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from transformers import TrainerCallback
from trl.models.utils import _ForwardRedirection


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def meet(limit_s: int) -> None:
    """Wait for the other ranks, for `limit_s` seconds at most."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=limit_s))


def slowest(seconds: float, device: torch.device) -> dict[str, float]:
    """How unevenly a phase took the ranks, and the most memory that any of them holds (GiB).

    Args:
        seconds: of the phase, on this rank.
        device: of this rank.
    """
    on_gpu = device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
    mine = torch.tensor([[seconds, psutil.Process().memory_info().rss / 2**30, allocated]], device=device)
    seconds_R, host_R, device_R = gather(mine).T.tolist()
    longest = max(seconds_R)
    return {
        "ranks/slowest": float(seconds_R.index(longest)),
        "ranks/seconds": longest,
        "ranks/waiting_share": 1 - sum(seconds_R) / (len(seconds_R) * longest) if longest else 0.0,
        "ranks/host_gib": max(host_R),
        **({"ranks/device_gib": max(device_R)} if on_gpu else {}),
    }


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


class RollCall(TrainerCallback):
    """Before each step: all ranks are there, or those that wait say who is not."""

    def __init__(self):
        self.group = torch.distributed.new_group(backend="gloo")

    def on_step_begin(self, args, state, control, **kwargs):
        limit = timedelta(seconds=args.ddp_timeout)
        torch.distributed.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True)


def let_fsdp_run_on_cpu() -> None:
    """accelerate takes FSDP for granted on accelerators only, and on a CPU would quietly train with DDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
