"""Adapters on the CPU: the tokens of one adapter go through its factors together.

vLLM's own functions copy the factors once for each token, so that an adapter on the output head copies a matrix of
vocabulary x rank for every token of a batch. T tokens, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu

NONE = -1  # the number of a token without an adapter


def _rows(numbers_T: Tensor) -> list[tuple[int, Tensor | slice]]:
    """Each adapter that is asked for, and its tokens."""
    asked = numbers_T.unique().tolist()
    if len(asked) == 1:
        return [(asked[0], slice(None))] if asked[0] != NONE else []
    return [(each, (numbers_T == each).nonzero().squeeze(1)) for each in asked if each != NONE]


def shrink(inputs: Tensor, factors: Tensor, out: Tensor, numbers_T: Tensor, scaling: float = 1.0) -> None:
    """`out[t] = scaling * A_t x_t`, with A_t (r, in) of the token's adapter."""
    for adapter, rows in _rows(numbers_T):
        part = inputs[rows].to(out.dtype) @ factors[adapter].squeeze(0).to(out.dtype).T
        out[rows, : part.shape[1]] = part.mul_(scaling)


def expand(inputs: Tensor, factors: Tensor, out: Tensor, numbers_T: Tensor, add_inputs: bool = True) -> None:
    """`out[t] += B_t y_t`, with B_t (out, r); what a model pads its output by is left alone."""
    assert add_inputs, "vLLM adds to what the layer gave"
    for adapter, rows in _rows(numbers_T):
        b = factors[adapter].squeeze(0)[: out.shape[1]].to(out.dtype)
        y = inputs[rows].to(out.dtype)
        if isinstance(rows, slice):
            out[:, : len(b)].addmm_(y, b.T)
        else:
            out[rows, : len(b)] += y @ b.T


def expand_slice(
    inputs: Tensor, factors: Tensor, out: Tensor, numbers_T: Tensor, offset: int, size: int, add_inputs: bool = True
) -> None:
    """Into `size` columns of `out`, where a layer is several in one."""
    expand(inputs, factors, out[:, offset : offset + size], numbers_T, add_inputs)


def _of_sequences(function: Callable) -> Callable:
    """The same for tokens whose adapters are named by sequence."""

    def run(inputs, factors, out, starts, lengths, numbers, batches, longest, tokens, *rest: Any) -> None:
        function(inputs, factors, out, torch.repeat_interleave(numbers, lengths), *rest)

    return run


def install() -> None:
    """For every engine of this process."""
    for kind, function in (("shrink", shrink), ("expand", expand), ("expand_slice", expand_slice)):
        setattr(punica_cpu, f"bgmv_{kind}", function)
        setattr(punica_cpu, f"sgmv_{kind}", _of_sequences(function))
