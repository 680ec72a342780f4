"""Where a policy trains: how several processes share its weights, gradients and optimizer states, and in three tiers
what a program trains with that has no trainer.

0. `TrainingBackend` (protocol.py) and `PyTorchTrainingBackend` (pytorch.py), around a model and an optimizer.
1. Functions that make the parts (create.py): `load_hf_model`, `create_adamw_optimizer`, ...
2. One call for the common case: `create_pytorch_backend`, `create_backend_with_scheduler`.
"""

from importlib import import_module
from typing import Any

# Imported when they are asked for: PyTorch takes seconds.
_PLACES = {
    "backends.adapters": ("AdapterSpec", "SharedBase"),
    "backends.create": (
        *("compute_device_map_single_gpu", "create_adamw_optimizer", "create_backend_with_scheduler"),
        *("create_cross_entropy_loss", "create_pytorch_backend", "create_warmup_cosine_scheduler"),
        *("create_warmup_scheduler", "load_hf_model", "parse_dtype"),
    ),
    "backends.create_sharded": ("create_deepspeed_backend", "create_fsdp_backend", "create_parallel_backend"),
    "backends.futures": ("RanksLost", "TrainFuture"),
    "backends.losses": ("additive", "compute_loss_from_outputs"),
    "backends.protocol": ("AdamParams", "Datum", "ForwardOutput", "StepOutput", "TrainingBackend"),
    "backends.pytorch": ("PyTorchTrainingBackend",),
    "rlt.worker_groups.service": ("TrainingService",),
    "rlt.worker_groups.ray_group": ("create_ray_backend",),
    "backends.sharded": ("ShardedTrainingBackend",),
}
_HOMES = {name: place for place, names in _PLACES.items() for name in names}
__all__ = sorted(_HOMES)  # pyrefly: ignore[unresolvable-dunder-all]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'backends' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
