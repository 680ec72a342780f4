"""Which device and which precision forward passes have."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

CPU_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


def supports_bfloat16(device_type: str) -> bool:
    """Whether the device computes in bfloat16, not merely stores or emulates it; False if that is unknown."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path("/proc/cpuinfo")
    if device_type != "cpu" or not info.is_file():
        return False
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    return any(
        CPU_BFLOAT16_FLAGS & set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")
    )


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def on(device: str | torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """The model, moved."""
    torch.nn.Module.to(model, device)
    return model


def uses_bfloat16(wanted: bool | None) -> bool:
    """Whether forward passes run in bfloat16: as the key `bf16` says; null asks the device."""
    return supports_bfloat16(device_type()) if wanted is None else wanted


def be_deterministic() -> None:
    """Ask torch for algorithms that give the same digits each time; an operation that has none warns with its name.

    On the CPU runs are so without it. On a GPU it is sums over atomics that change (of gathered rows, for one), and
    cuBLAS, which wants a workspace of its own (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
