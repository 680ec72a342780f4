"""Seeded sampling on the CPU: one uniform number a token from its request's generator, instead of one per vocabulary
entry, which took half of the time that a small model's generation takes."""

import torch
from vllm.platforms import current_platform
from vllm.v1.sample import sampler
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

BLOCK = 256  # vocabulary entries
ELEMENTS_AT_ONCE = 2**20  # of the logits: 4 MiB, which a processor's cache holds

_vllms = TopKTopPSampler.forward_cpu


def inverse_transform(probs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Tokens whose share of the cumulative probabilities holds each number (inverse transform sampling).

    In two steps, because only the block that a number falls into needs its cumulative sum.

    Args:
        probs_BV: not negative; sums need not be 1.
        uniform_B: float64, in [0, 1).

    Returns:
        Token ids, (B,); never one of probability 0.
    """
    rest = -probs_BV.shape[1] % BLOCK
    padded = torch.nn.functional.pad(probs_BV, (0, rest)) if rest else probs_BV
    blocks = padded.unflatten(1, (-1, BLOCK))
    ends = blocks.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    wanted = uniform_B * ends[:, -1]
    block = _first_above(ends, wanted)
    row = torch.arange(len(block))
    starts = torch.where(block > 0, ends[row, block - 1], 0.0)
    return block * BLOCK + _first_above(blocks[row, block].cumsum(dim=1, dtype=torch.float64), wanted - starts)


def _first_above(cumulative: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where each row first exceeds its number; a number that rounding took to the row's end or behind stays inside."""
    last = cumulative[:, -1].nextafter(torch.zeros((), dtype=cumulative.dtype))
    return torch.searchsorted(cumulative, torch.minimum(wanted, last).unsqueeze(1), right=True).squeeze(1)


def forward_cpu(self, logits, generators, k, p):
    """As vLLM's, which is asked where a request has no seed of its own."""
    if len(generators) != logits.shape[0] or self.use_fp64_gumbel:
        return _vllms(self, logits, generators, k, p)
    logits = apply_top_k_top_p(logits, k, p)
    log_probs = torch.empty_like(logits, dtype=torch.float32)
    numbers = torch.stack(
        [torch.rand((), generator=generators[row], dtype=torch.float64) for row in range(len(logits))]
    )
    rows = max(1, ELEMENTS_AT_ONCE // logits.shape[1])
    tokens = []
    for low, out, drawn in zip(logits.split(rows), log_probs.split(rows), numbers.split(rows), strict=True):
        torch.log_softmax(low, dim=-1, dtype=torch.float32, out=out)
        tokens.append(inverse_transform(out.exp(), drawn))
    returned = {"processed_logits": logits, "processed_logprobs": log_probs}.get(self.logprobs_mode)
    return torch.cat(tokens), returned


def no_ranks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """0 for each token: vLLM compiles a kernel for its rank, which takes seconds in every process and is never read."""
    return torch.zeros(len(x), dtype=torch.long)


def install_on_cpu() -> None:
    """vLLM calls it in every process of the environment, on a GPU too, where nothing is to be replaced."""
    if current_platform.is_cpu():
        install()


def install() -> None:
    """For every engine that this process builds from here on; GPUs sample in their own way."""
    TopKTopPSampler.forward_cpu = forward_cpu
    sampler.batched_count_greater_than = no_ranks
