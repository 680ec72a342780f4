"""Attention of a packed row on the CPU: exact, without a mask over all pairs of the row, in blocks that fit a cache.

Every block of queries is multiplied with the keys that it sees: the keys that its branch continues, and those of the
branch up to the block; in a layer with a sliding window, the last of these only. The products use the processor's
matrix instructions, which torch's fused CPU attention uses neither forward nor backward. Only queries, keys and values
are kept for the backward pass, where probabilities are computed again (as in arXiv 2205.14135).
In bfloat16, products and probabilities are rounded to bfloat16, as in transformers' eager attention; the softmax
computes in float32 inside, and a prefix sums the gradients of all that continue it in float32.
K key heads, R query heads per key head, N queries of a block, S keys that it sees, T tokens of the row, D head size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

BLOCK_ELEMENTS = 2**19  # probabilities of a block: 1 MiB in bfloat16
FEWEST_QUERIES = 16  # of a block, however many keys it sees


class Block(NamedTuple):
    """Queries [start, end) of a row, and the keys that they see, neighbours in the sequence: those of `before`, and
    [own_start, end)."""

    start: int
    end: int
    before: tuple[slice, ...]
    own_start: int

    @property
    def seen(self) -> tuple[slice, ...]:
        return (*self.before, slice(self.own_start, self.end))


class Scores(NamedTuple):
    """How scores become probabilities: a factor on queries times keys, the sliding window (tokens, the query among
    them), and the cap of a soft cap on scores (Gemma 2, arXiv 2408.00118)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def blocks_of(branches, heads: int, window: int | None = None) -> Iterator[Block]:
    """The blocks of a layout, branch by branch; their keys are those that some query of the block may see."""
    for first, end, before in branches:
        shared = sum(last - start for start, last in before)
        keys = shared + end - first
        if window is not None:
            keys = min(keys, 2 * window)
        step = max(FEWEST_QUERIES, BLOCK_ELEMENTS // (heads * keys))
        if window is not None:  # a block's keys are a window and itself: most of them count for most of its queries
            step = min(step, max(FEWEST_QUERIES, window))
        for start in range(first, end, step):
            out_of_sight = 0 if window is None else max(0, shared + start - first - window + 1)
            own_start = first + max(0, out_of_sight - shared)
            yield Block(start, min(start + step, end), _without_first(before, out_of_sight), own_start)


def _without_first(places, count: int) -> tuple[slice, ...]:
    """What is left of a path behind its first `count` tokens."""
    left = []
    for start, end in places:
        if count < end - start:
            left.append(slice(start + count, end))
        count = max(0, count - (end - start))
    return tuple(left)


class BlockwiseAttention(torch.autograd.Function):
    """Softmax attention over the branches of a packed row; see `block_attention`."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, branches, how: Scores):
        out_1THD = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        out_KRTD, q_KRTD = _by_key_head(out_1THD.transpose(1, 2), key), _by_key_head(query * how.scale, key)
        for block in blocks_of(branches, query.shape[1], how.window):
            keys_KSD, values_KSD = _seen(key, block), _seen(value, block)
            probs_KNS, _, _ = _probabilities(_rows(q_KRTD, block), keys_KSD, block, how, sinks)
            out_KND = torch.bmm(probs_KNS, values_KSD)
            out_KRTD[:, :, block.start : block.end] = out_KND.view(*out_KRTD.shape[:2], -1, out_KRTD.shape[-1])
        ctx.save_for_backward(query, key, value, sinks)
        ctx.branches, ctx.how = branches, how
        return out_1THD

    @staticmethod
    @torch.autograd.function.once_differentiable  # its own type loses the signature
    def backward(ctx, *grads):  # pyrefly: ignore[bad-override]
        (grad_1THD,) = grads
        query, key, value, sinks = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.zeros_like(query)
        # A prefix collects gradients from all branches that continue it.
        grad_key, grad_value = (torch.zeros_like(x, dtype=exact) for x in (key, value))
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=exact)
        q_KRTD, dq_KRTD = _by_key_head(query * ctx.how.scale, key), _by_key_head(grad_query, key)
        do_KRTD = _by_key_head(grad_1THD.transpose(1, 2).to(query.dtype), key)
        for block in blocks_of(ctx.branches, query.shape[1], ctx.how.window):
            keys_KSD, values_KSD = _seen(key, block), _seen(value, block)
            q_KND, do_KND = _rows(q_KRTD, block), _rows(do_KRTD, block)
            probs_KNS, sunk_KN, slope_KNS = _probabilities(q_KND, keys_KSD, block, ctx.how, sinks)
            dp_KNS = torch.bmm(do_KND, values_KSD.transpose(1, 2))
            if grad_sinks is not None:
                grad_sinks -= _per_head(sunk_KN * torch.linalg.vecdot(probs_KNS, dp_KNS), grad_sinks)
            # d scores = probs (d probs - sum of probs d probs)
            ds_KNS = torch._softmax_backward_data(dp_KNS, probs_KNS, -1, query.dtype)
            if slope_KNS is not None:
                ds_KNS = ds_KNS * slope_KNS
            dq_KND = torch.bmm(ds_KNS, keys_KSD)
            dq_KRTD[:, :, block.start : block.end] = dq_KND.view(*dq_KRTD.shape[:2], -1, dq_KRTD.shape[-1])
            _collect(grad_key, block, torch.bmm(ds_KNS.transpose(1, 2), q_KND))
            _collect(grad_value, block, torch.bmm(probs_KNS.transpose(1, 2), do_KND))
        grad_sinks = None if grad_sinks is None else grad_sinks.to(sinks.dtype)
        grad_key, grad_value = grad_key.to(key.dtype), grad_value.to(value.dtype)
        return grad_query.mul_(ctx.how.scale), grad_key, grad_value, grad_sinks, None, None


def block_attention(query, key, value, branches, how: Scores, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Each branch attends, causally, to itself and to the tokens that it continues.

    Args:
        query: (1, K * R, T, D).
        key: (1, K, T, D), and `value` likewise.
        branches: of the row (`models.attention.Branch`).
        how: scores become probabilities.
        sinks: (K * R,) one more score for each head, which takes its share of the softmax and gives no value (gpt-oss;
            arXiv 2309.17453).

    Returns:
        (1, T, K * R, D) in the dtype of `query` (of the products, under autocast), D that of `value`; zeros where no
        branch is.
    """
    if torch.is_autocast_enabled("cpu"):  # as SDPA does it; rotary positions may have made float32 of two of them
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return BlockwiseAttention.apply(query, key, value, sinks, branches, how)


def _by_key_head(x_1HTD: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(1, K * R, T, D) -> (K, R, T, D), a view."""
    return x_1HTD[0].unflatten(0, (key.shape[1], -1))


def _rows(x_KRTD: torch.Tensor, block: Block) -> torch.Tensor:
    """(K, R * N, D): the block's rows of all query heads of a key head, below one another."""
    return x_KRTD[:, :, block.start : block.end].flatten(1, 2)


def _seen(x_1KTD: torch.Tensor, block: Block) -> torch.Tensor:
    """(K, S, D): the keys or values that the block sees."""
    parts = [x_1KTD[0, :, keys] for keys in block.seen]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _collect(grad_1KTD: torch.Tensor, block: Block, seen_KSD: torch.Tensor) -> None:
    lengths = [keys.stop - keys.start for keys in block.seen]
    for keys, part in zip(block.seen, seen_KSD.split(lengths, dim=1), strict=True):
        grad_1KTD[0, :, keys] += part


def _per_head(values_KN: torch.Tensor, heads_H: torch.Tensor) -> torch.Tensor:
    """(H,): sums over the N rows of each query head."""
    return values_KN.to(heads_H.dtype).view(len(heads_H), -1).sum(1)


def _probabilities(q_KND: torch.Tensor, keys_KSD: torch.Tensor, block: Block, how: Scores, sinks):
    """Attention probabilities of scaled queries: a query sees no later key, and none a window or more before it.

    Returns:
        (K, R * N, S) probabilities, (K, R * N) those of the sinks, and (K, R * N, S) the slope of the soft cap.
    """
    scores_KNS = torch.bmm(q_KND, keys_KSD.transpose(1, 2))
    slope_KNS = None
    if how.softcap is not None:
        scores_KNS = torch.tanh(scores_KNS / how.softcap)
        slope_KNS = 1 - scores_KNS.square()
        scores_KNS = scores_KNS * how.softcap
    n, s = block.end - block.start, scores_KNS.shape[-1]
    by_query = scores_KNS.unflatten(1, (-1, n))
    later_NN = torch.ones(n, n, dtype=torch.bool, device=scores_KNS.device).triu(1)
    by_query[..., -n:].masked_fill_(later_NN, float("-inf"))
    if how.window is not None and s > how.window:
        # The last key is the last query's own: key j stands i + s - n - j tokens before query i.
        far_NS = torch.ones(n, s, dtype=torch.bool, device=scores_KNS.device).tril(s - n - how.window)
        by_query.masked_fill_(far_NS, float("-inf"))
    if sinks is None:
        return torch.softmax(scores_KNS, dim=-1), None, slope_KNS
    column_KN1 = sinks.to(scores_KNS.dtype).repeat_interleave(n).view(*scores_KNS.shape[:2], 1)
    probs_KNS = torch.softmax(torch.cat([scores_KNS, column_KN1], dim=-1), dim=-1)
    return probs_KNS[..., :-1].contiguous(), probs_KNS[..., -1], slope_KNS
