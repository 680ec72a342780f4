"""The gradients of an optimizer step: added up by several backward passes, given up, and made those of all ranks.

accelerate's `backward` does the last with the last backward pass: DDP reduces while it runs, and DeepSpeed takes the
optimizer's step. Here both wait until all ranks have their gradients, so that a rank which ran out of memory amid its
own can say so first: the others would wait in a reduction that it does not reach. DDP's reduction then does not overlap
with the backward pass. FSDP2 reduces as ever.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from backends import deepspeed, fsdp2


def held_back(model: torch.nn.Module) -> AbstractContextManager:
    """Within it DDP reduces nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def add_gradients(accelerator, loss: torch.Tensor, last: bool) -> None:
    """A backward pass, whose gradients are added to those of the step.

    Args:
        last: whether no other follows in this step: then ZeRO-1 reduces what this rank has added up.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.add_gradients(accelerator.deepspeed_engine_wrapped.engine, loss, last)
    else:
        accelerator.backward(loss)


def give_up_gradients(model: torch.nn.Module) -> None:
    """As at the start of an optimizer step: there are none."""
    if deepspeed.is_zero(model):
        deepspeed.give_up_gradients(model)
        return
    model.zero_grad(set_to_none=True)
    fsdp2.give_up_gradients(model)


def share_gradients(model: Any) -> None:
    """The step's gradients become those of all ranks; under DeepSpeed the optimizer's step is taken. Collective."""
    if deepspeed.is_zero(model):
        model.step()
    elif isinstance(model, DistributedDataParallel):
        average_gradients(model)


@torch.no_grad()
def average_gradients(model: DistributedDataParallel) -> None:
    """The mean over ranks; a parameter that a rank's passes did not reach has zeros there, if others' reached it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group, device = model.process_group, trained[0].device
    reached = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX, group=group)
    for parameter, anywhere in zip(trained, reached.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad *= 1 / torch.distributed.get_world_size(group)  # before the sum, as DDP has it
        torch.distributed.all_reduce(parameter.grad, group=group)
