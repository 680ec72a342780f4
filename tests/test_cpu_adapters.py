"""Adapters in vLLM on the CPU: token by token, as written."""

import pytest
import torch

from rlt.generation.cpu.adapters import expand, expand_slice, shrink

TOKENS, WIDTH, RANK, OUT = 6, 5, 3, 7


def stacked(*shape: int) -> torch.Tensor:
    """Factors of two adapters."""
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("numbers", [[0, 1, -1, 1, 0, -1], [1] * TOKENS, [-1] * TOKENS])
def test_each_token_goes_through_its_own_adapter_and_some_through_none(numbers):
    x, a, b = torch.randn(TOKENS, WIDTH), stacked(RANK, WIDTH), stacked(OUT, RANK)
    base = torch.randn(TOKENS, OUT)
    out, low = base.clone(), torch.zeros(TOKENS, RANK)
    shrink(x, a, low, torch.tensor(numbers), 2.0)
    expand(low, b, out, torch.tensor(numbers), True)
    for token, number in enumerate(numbers):
        added = torch.zeros(OUT) if number < 0 else b[number, 0] @ (2.0 * a[number, 0] @ x[token])
        torch.testing.assert_close(out[token], base[token] + added)


def test_a_slice_of_a_layer_and_what_a_model_pads_are_left_alone():
    low, b = torch.randn(TOKENS, RANK), stacked(OUT, RANK)
    out, numbers = torch.zeros(TOKENS, 20), torch.tensor([0, 1] * 3)
    expand_slice(low, b, out, numbers, 4, OUT)
    assert not out[:, :4].any() and not out[:, 4 + OUT :].any()
    torch.testing.assert_close(out[1, 4 : 4 + OUT], b[1, 0] @ low[1])
    wide = torch.zeros(TOKENS, OUT + 2)
    expand(low, b, wide, numbers)
    assert not wide[:, OUT:].any()
    torch.testing.assert_close(wide[0, :OUT], b[0, 0] @ low[0])
