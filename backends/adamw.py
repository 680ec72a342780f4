"""An optimizer whose numbers come with each step."""

import math
from dataclasses import asdict
from typing import Any

import torch

from backends import fsdp2
from backends.protocol import AdamParams
from rlt.errors import Refused

NOT_FINITE = "the norm of the gradients is {}: they were dropped, and nothing was changed"


def check_adam(params: AdamParams, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """
    Raises:
        Refused: numbers that cannot be, an optimizer that has none of them, or a schedule that sets them.
    """
    for name, value in asdict(params).items():
        below_one = name in ("beta1", "beta2")
        if not math.isfinite(value) or value < 0 or (below_one and value >= 1):
            raise Refused(f"{name}={value}: a number {'from 0 to below 1' if below_one else 'of 0 or more'} would do")
    if scheduler is not None:
        raise Refused("this backend has a schedule for its learning rate: call optim_step() without parameters")
    if any("betas" not in group or "eps" not in group for group in optimizer.param_groups):
        raise Refused(f"{type(optimizer).__name__} takes no AdamParams: call optim_step() without parameters")


def overwrite(optimizer: torch.optim.Optimizer, params: AdamParams) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = params.learning_rate, (params.beta1, params.beta2)
        group["eps"], group["weight_decay"] = params.eps, params.weight_decay


def step(optimizer: torch.optim.Optimizer, largest: float) -> float | None:
    """Step with gradients that are scaled down to a norm of at most `largest` (0: they are not); the norm of all of
    them together before, or None where there are none, and nothing is done.

    Raises:
        Refused: the norm is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return None
    total = fsdp2.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    norm = total.item()
    if not math.isfinite(norm):
        raise Refused(NOT_FINITE.format(norm))
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, total)
    optimizer.step()
    return norm
