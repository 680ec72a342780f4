"""Several processes of one run: how they meet, and what accelerate leaves out on a CPU."""

import os
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from trl.models.utils import _ForwardRedirection

from rlt.logprobs import LogProbs


def inside_forward(model, inner, sharded: bool, compute: Callable[[], LogProbs]) -> LogProbs:
    """Run `compute` as part of the forward pass of what is wrapped around `inner`.

    DDP, ZeRO and FSDP gather weights and reduce gradients only for what runs inside a forward pass that they know. This
    forward pass returns one tensor: ZeRO-3 wants the same number of tensors with a way back on every rank, and ranks
    differ in how many of their sequences count.
    """
    if not sharded and inner is model:
        return compute()
    sizes: list[list[int]] = []

    def flat() -> torch.Tensor:
        kinds = compute()
        sizes.extend(list(map(len, values)) for values in kinds)
        return torch.cat([value for values in kinds for value in values] or [torch.zeros(0)])

    log_probs, entropies = _ForwardRedirection()(model, inner, flat).split([sum(kind) for kind in sizes])
    return list(log_probs.split(sizes[0])), list(entropies.split(sizes[1]))


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
