"""Backends from names: functions that make each part, and the common case in one call.

    backend = create_pytorch_backend("embedded/smollm2-135m-instruct", "runs/a", learning_rate=1e-4)

is, by the functions of the tier below,

    model = load_hf_model("embedded/smollm2-135m-instruct", dtype="float32", device="auto")
    optimizer = create_adamw_optimizer(model, learning_rate=1e-4)
    backend = PyTorchTrainingBackend(model, optimizer, create_cross_entropy_loss(), "runs/a", "auto")

PyTorch is imported where it is needed: a program that only has these names starts at once.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlt.errors import Refused

if TYPE_CHECKING:
    import torch

    from backends.pytorch import PyTorchTrainingBackend

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float64": "float64",
    "fp64": "float64",
}
DECAYS: dict[str, Callable[[float], float]] = {  # from how far a schedule is behind its warm-up to how high it still is
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def parse_dtype(name: "str | torch.dtype") -> "torch.dtype":
    """A dtype by its name.

    Raises:
        Refused: there is none of that name.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise Refused(f"dtype={name!r} is not known: {', '.join(DTYPES)} would do")
    return getattr(torch, DTYPES[name])


def compute_device_map_single_gpu(device: str = "auto") -> dict[str, str]:
    """Where `from_pretrained` puts a whole model: on the GPU with the most free memory, or on the CPU without one."""
    import torch

    if device != "auto":
        return {"": device}
    gpus = range(torch.cuda.device_count())
    free = {f"cuda:{number}": torch.cuda.mem_get_info(number)[0] for number in gpus}
    return {"": max(free, key=lambda name: free[name]) if free else "cpu"}


def load_hf_model(
    name_or_path: str,
    dtype: "str | torch.dtype" = "float32",
    device: str = "auto",
    attn_implementation: str = "shared_prefix",
    trust_remote_code: bool = False,
) -> Any:
    """A causal model to train: `embedded/...`, a folder, or a hub name; arguments as in `rlt.models.loading`.

    Raises:
        Refused: it cannot be loaded.
    """
    from rlt.models.loading import load_policy
    from rlt.models.paths import resolve_model_path

    return load_policy(
        resolve_model_path(name_or_path),
        dtype=parse_dtype(dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device=compute_device_map_single_gpu(device)[""],
    )


def create_adamw_optimizer(
    model: Any,
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-12,
    weight_decay: float = 0.0,
) -> "torch.optim.Optimizer":
    """AdamW of what a model trains; the numbers are those of `AdamParams`."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)


def create_cross_entropy_loss() -> Callable:
    """The loss of plain batches, as a function of (outputs, labels): a sum over labels."""
    from backends.plain import plain_loss

    return plain_loss("causal_lm")


def create_warmup_scheduler(
    optimizer: "torch.optim.Optimizer",
    warmup_steps: int,
    total_steps: int,
    decay_style: str = "cosine",
    min_lr_ratio: float = 0.1,
) -> Any:
    """The rate rises in equal parts to the optimizer's own, which the last of the warm-up's steps has, and falls to
    `min_lr_ratio` of it at `total_steps`.

    Raises:
        Refused: an unknown style, or numbers that cannot be.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if decay_style not in DECAYS:
        raise Refused(f"decay_style={decay_style!r} is not known: {', '.join(DECAYS)} would do")
    if not 0 <= warmup_steps <= total_steps or not 0 <= min_lr_ratio <= 1:
        raise Refused(
            f"warmup_steps={warmup_steps}, total_steps={total_steps}, min_lr_ratio={min_lr_ratio}: a warm-up of 0 to "
            "total_steps steps and a ratio from 0 to 1 would do"
        )

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * DECAYS[decay_style](done)

    return LambdaLR(optimizer, share)


def create_warmup_cosine_scheduler(
    optimizer: "torch.optim.Optimizer", warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.1
) -> Any:
    return create_warmup_scheduler(optimizer, warmup_steps, total_steps, "cosine", min_lr_ratio)


def create_pytorch_backend(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    learning_rate: float = 1e-4,
    dtype: "str | torch.dtype" = "float32",
    device: str = "auto",
    autocast: "str | torch.dtype | None" = None,
    **options: Any,
) -> "PyTorchTrainingBackend":
    """A backend that trains all weights of a model with AdamW.

    Args:
        dtype: of the weights, which in bfloat16 do not move at small learning rates.
        autocast: of what may run in a lower precision all the same: "bfloat16", say.
        options: of `PyTorchTrainingBackend`: token_budget.
    """
    from backends.pytorch import PyTorchTrainingBackend

    model = load_hf_model(model_name, dtype, device)
    optimizer = create_adamw_optimizer(model, learning_rate)
    options["autocast"] = None if autocast is None else parse_dtype(autocast)
    return PyTorchTrainingBackend(model, optimizer, create_cross_entropy_loss(), checkpoint_dir, device, **options)


def create_backend_with_scheduler(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_style: str = "cosine",
    min_lr_ratio: float = 0.1,
    **options: Any,
) -> "PyTorchTrainingBackend":
    """The same with a schedule for its learning rate; steps then come without `AdamParams`.

    Args:
        options: of `create_pytorch_backend`.
    """
    backend = create_pytorch_backend(model_name, checkpoint_dir, **options)
    schedule = warmup_steps, total_steps, decay_style, min_lr_ratio
    backend.scheduler = create_warmup_scheduler(backend.optimizer, *schedule)
    return backend
