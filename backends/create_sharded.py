"""Backends over several ranks from names; each rank calls the same function in its own process.

    torchrun --nproc_per_node 2 program.py
    backend = create_fsdp_backend("embedded/smollm2-135m-instruct", "runs/a", learning_rate=1e-4)

is, by the functions of the tiers below, in each rank,

    device = join("auto")
    model = load_hf_model("embedded/smollm2-135m-instruct", "float32", "cpu")
    ranks = FullyShardedData(model, device)
    optimizer = create_adamw_optimizer(model, 1e-4)
    backend = ShardedTrainingBackend(ranks, optimizer, create_cross_entropy_loss(), "runs/a", device)

Without torchrun's variables there is one rank. A model is loaded whole by each rank into the host's memory first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.create import create_adamw_optimizer, create_cross_entropy_loss, load_hf_model, parse_dtype
from rlt.errors import Refused

if TYPE_CHECKING:
    import torch

    from backends.sharded import ShardedTrainingBackend

STAGES = (1, 2, 3)


def create_parallel_backend(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    learning_rate: float = 1e-4,
    dtype: "str | torch.dtype" = "float32",
    device: str = "auto",
    **options: Any,
) -> "ShardedTrainingBackend":
    """Every rank has the whole model, and reads a share of each batch.

    Args:
        options: as of `create_pytorch_backend`: autocast, token_budget.
    """
    from backends.ranks import Copies, join

    place = join(device)
    model = load_hf_model(model_name, dtype, str(place))
    return _backend(Copies(model), create_adamw_optimizer(model, learning_rate), checkpoint_dir, place, options)


def create_fsdp_backend(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    learning_rate: float = 1e-4,
    dtype: "str | torch.dtype" = "float32",
    device: str = "auto",
    **options: Any,
) -> "ShardedTrainingBackend":
    """Weights, gradients and optimizer states in shards, by PyTorch's FSDP2; arguments as above."""
    from backends.ranks import FullyShardedData, join

    place = join(device)
    ranks = FullyShardedData(load_hf_model(model_name, dtype, "cpu"), place)
    return _backend(ranks, create_adamw_optimizer(ranks.model, learning_rate), checkpoint_dir, place, options)


def create_deepspeed_backend(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    zero_stage: int = 3,
    learning_rate: float = 1e-4,
    dtype: "str | torch.dtype" = "float32",
    device: str = "auto",
    **options: Any,
) -> "ShardedTrainingBackend":
    """Optimizer states (stage 1), gradients (2) and weights (3) in shards, by DeepSpeed; arguments as above.

    Raises:
        Refused: there is no such stage.
    """
    from backends.ranks import Zero, join

    if zero_stage not in STAGES:
        raise Refused(f"zero_stage={zero_stage!r}: {', '.join(map(str, STAGES))} would do")
    place = join(device)
    model = load_hf_model(model_name, dtype, str(place))
    optimizer = create_adamw_optimizer(model, learning_rate)
    ranks = Zero(model, optimizer, zero_stage, parse_dtype(dtype))
    return _backend(ranks, optimizer, checkpoint_dir, place, options)


def _backend(ranks, optimizer, checkpoint_dir, place, options: dict[str, Any]) -> "ShardedTrainingBackend":
    from backends.sharded import ShardedTrainingBackend

    autocast = options.pop("autocast", None)
    options["autocast"] = None if autocast is None else parse_dtype(autocast)
    return ShardedTrainingBackend(ranks, optimizer, create_cross_entropy_loss(), checkpoint_dir, place, **options)
