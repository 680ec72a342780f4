"""The gradients of an optimizer step: given up, and made those of all ranks.

DDP does the last while its last backward pass runs. Here it waits until all ranks have their gradients, so that a rank
which ran out of memory amid its own can say so first: the others would wait in a reduction that it does not reach. The
reduction then does not overlap with the backward pass. FSDP2 reduces as ever; DeepSpeed's steps do not come here.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from backends import fsdp2


def held_back(model: torch.nn.Module) -> AbstractContextManager:
    """Within it DDP reduces nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def give_up_gradients(model: torch.nn.Module) -> None:
    """As at the start of an optimizer step: there are none."""
    model.zero_grad(set_to_none=True)
    fsdp2.give_up_gradients(model)


def share_gradients(model: torch.nn.Module) -> None:
    """The step's gradients become those of all ranks, where the backward passes have not seen to it; collective."""
    if isinstance(model, DistributedDataParallel):
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
