"""vLLM's norm kernels, by hand and in the engine."""

import math

import pytest
import torch
from vllm import ir

from rlt.generation.cpu import norms as cpu_norms

RMS = math.sqrt((3.0**2 + 4.0**2) / 2)


@pytest.fixture(autouse=True)
def installed():
    cpu_norms.install()
    cpu_norms.install()  # as vLLM may


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_hand(dtype):
    weight, x, residual, expected = (
        torch.tensor([pair] * 8, dtype=dtype).flatten() for pair in ([1, 2], [1, 2], [2, 2], [3 / RMS, 8 / RMS])
    )
    x, residual, expected = x[None], residual[None], expected[None]
    torch.testing.assert_close(cpu_norms.rms_norm(x + residual, weight, 0.0), expected)
    normed, summed = cpu_norms.fused_add_rms_norm(x, residual, weight, 0.0)
    torch.testing.assert_close(normed, expected)
    assert summed.tolist() == [[3.0, 4.0] * 8]


def test_an_engine_takes_them_where_they_fit_and_plain_operations_elsewhere():
    norm = ir.ops.rms_norm
    with norm.set_priority(cpu_norms.KERNELS["ir_op_priority"]["rms_norm"] + ["native"]):
        x, weight = torch.randn(3, 2, 64), torch.ones(64)
        assert norm.dispatch(x[:, 0].contiguous(), weight, 1e-6).provider == cpu_norms.PROVIDER
        for other in (
            (x, weight),
            (x[:, 0], weight),
            (x[:, 0].contiguous(), weight.bfloat16()),
            (x[0, :, :63].contiguous(), weight[:63]),
        ):
            assert norm.dispatch(*other, 1e-6).provider == "native"
