"""FSDP2: parameters are DTensors, each rank with its shard."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(model: Any, device: torch.device) -> Any:
    """The model itself, in shards over all ranks: layer by layer, as transformers has them, and the rest together.

    What a pass has gathered is given back at once, at the root too: a later pass would read it as it was.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value in the shards of a parameter; numbers, and values of whole parameters, as they are."""
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def give_up_gradients(model: torch.nn.Module) -> None:
    """What passes have added up without sharing it (accelerate's `no_sync`) is kept by FSDP2, out of sight."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for kept in group.fsdp_params:
                    kept.unsharded_accumulated_grad = None
                    if hasattr(kept, "_unsharded_param"):
                        kept._unsharded_param.grad = None
