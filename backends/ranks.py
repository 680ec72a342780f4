"""How ranks share a model: all with a copy of it, or each with shards (FSDP2, ZeRO).

A rank's gradients are those of its share of a batch; together they are those of the whole batch, sums and not means.
FSDP2 and ZeRO take means, so a loss is multiplied by the number of ranks there.
"""

import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from trl.models.utils import _ForwardRedirection

from backends import adamw, deepspeed, fsdp2
from backends.distributed import all_reduce, world_size
from rlt.errors import Refused
from rlt.survival.oom import Watch

LIMIT_S = 1800.0  # for one rank to wait for another in a collective


def join(device: str, limit_s: float = LIMIT_S) -> torch.device:
    """Be one of the ranks that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), as torchrun sets
    it; the only one without. Whoever has joined stays.

    Args:
        device: "auto": the GPU of this rank's number on its machine, or the CPU where there is none.

    Returns:
        This rank's device.
    """
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"
    found = (
        torch.device(device) if device not in ("auto", "cuda") else torch.device(f"cuda:{local}" if on_gpu else "cpu")
    )
    if on_gpu:
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        kind, limit = "nccl" if on_gpu else "gloo", timedelta(seconds=limit_s)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(kind, timeout=limit)
        else:
            dist.init_process_group(kind, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    return found


class Copies:
    """Every rank has the whole model: plain data parallel. Gradients are added up over ranks in the optimizer's step.

    Attributes:
        collective: whether all ranks make each pass together.
        wrapped: what knows of the sharding: the model itself, or what is around it.
    """

    collective = False

    def __init__(self, model: Any):
        self.model = self.wrapped = model

    def inside(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `compute` gives, as part of a forward pass that the sharding knows."""
        return compute()

    def outputs(self, inputs: Mapping[str, Any]) -> Any:
        """The model's own forward pass."""
        return self.wrapped(**inputs)

    def backward(self, total: Tensor, watch: Watch) -> None:
        """Add a loss's gradients."""
        total.backward()

    def give_up_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, optimizer: torch.optim.Optimizer, largest: float) -> float | None:
        """Step with the gradients of all ranks, scaled down to a norm of at most `largest` (0: they are not); the norm
        before, or None where there are none.

        Raises:
            Refused: the norm is not finite; nothing was changed.
        """
        for parameter in self._reached(optimizer):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.copy_(all_reduce(parameter.grad))
        return adamw.step(optimizer, largest)

    @staticmethod
    def _reached(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Parameters for which some rank has gradients."""
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        reached = all_reduce(torch.tensor([float(p.grad is not None) for p in trained]), "max").tolist()
        return [parameter for parameter, anywhere in zip(trained, reached, strict=True) if anywhere]


class Shards(Copies):
    """What FSDP2 and ZeRO have in common: each pass is made by all ranks together."""

    collective = True

    def __init__(self, model: Any, wrapped: Any):
        super().__init__(model)
        self.wrapped = wrapped

    def inside(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        shapes: list[torch.Size] = []

        def flat() -> Tensor:  # one tensor, as ZeRO-3 wants as many of them on every rank
            values = compute()
            shapes.extend(value.shape for value in values)
            return torch.cat([value.flatten() for value in values])

        values = _ForwardRedirection()(self.wrapped, self.model, flat)
        return [p.view(s) for p, s in zip(values.split([s.numel() for s in shapes]), shapes, strict=True)]

    def backward(self, total: Tensor, watch: Watch) -> None:
        watch.enter()
        self._backward(total * world_size())
        watch.leave()

    def _backward(self, total: Tensor) -> None:
        total.backward()


class FullyShardedData(Shards):
    """FSDP2."""

    def __init__(self, model: Any, device: torch.device):
        super().__init__(model, fsdp2.shard(model, device))

    def give_up_gradients(self) -> None:
        super().give_up_gradients()
        fsdp2.give_up_gradients(self.model)

    def step(self, optimizer: torch.optim.Optimizer, largest: float) -> float | None:
        return adamw.step(optimizer, largest)


class Zero(Shards):
    """DeepSpeed's stages 1 to 3; its step is ours to call (unmanaged accumulation)."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, stage: int, dtype: torch.dtype):
        super().__init__(model, deepspeed.engine_of(model, optimizer, stage, dtype))

    def _backward(self, total: Tensor) -> None:
        self.wrapped.backward(total, scale_wrt_gas=False)

    def give_up_gradients(self) -> None:
        deepspeed.give_up_gradients(self.wrapped)

    def step(self, optimizer: torch.optim.Optimizer, largest: float) -> float | None:
        zero = self.wrapped.optimizer
        zero.clip_grad = largest
        self.wrapped.step()
        norm = float(self.wrapped.get_global_grad_norm())
        if zero.overflow or not math.isfinite(norm):
            raise Refused(adamw.NOT_FINITE.format(norm))
        return norm
