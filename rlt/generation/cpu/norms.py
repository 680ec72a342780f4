"""RMSNorm on the CPU by vLLM's own kernels, which it keeps for compiled models: without compiling, it runs eight plain
operations a norm, a tenth of the time that a small model's generation takes."""

import torch
from torch import Tensor

PROVIDER = "cpu_kernel"
WIDTH = 16  # the kernels take sizes that their vectors divide
KERNELS = {"ir_op_priority": {name: [PROVIDER] for name in ("rms_norm", "fused_add_rms_norm")}}  # vLLM's kernel_config


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def takes_norm(x, weight, epsilon, variance_size=None) -> bool:
    plain = x.device.type == "cpu" and x.dim() == 2 and x.is_contiguous() and x.shape[1] % WIDTH == 0
    return plain and weight is not None and weight.dtype == x.dtype and variance_size is None


def takes_sum_and_norm(x, x_residual, weight, epsilon, variance_size=None) -> bool:
    return takes_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype


def install_on_cpu() -> None:
    """vLLM calls it in every process of the environment, on a GPU too, where nothing is to be replaced."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        install()


def install() -> None:
    """For engines that are built with `KERNELS`; vLLM may call it more than once in a process."""
    from vllm import _custom_ops, ir  # noqa: F401 (registers the kernels); heavy, and serve.py asks for KERNELS alone

    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=takes_norm)(rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=takes_sum_and_norm, inplace=True)(
            fused_add_rms_norm
        )
