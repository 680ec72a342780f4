"""Attention over a packed row in which sequences share their beginnings.

A row is a tree of tokens, depth first: branch after branch. A branch is the rest of a sequence whose first tokens stand
earlier in the row. A token looks at these first tokens, and at its branch up to itself; in a layer with a sliding
window, at those of them whose position in the sequence is less than a window before its own. So no mask over all pairs
of the row is needed: on the CPU each branch is a few small products (cpu_attention.py), on a GPU the row is one call of
FlexAttention with a block mask (arXiv 2412.05496). Computing a shared prefix apart from what follows it is the idea of
cascade inference (arXiv 2402.05099), here with gradients and for any depth.

Registered with transformers as `shared_prefix`; without a layout it is SDPA, so generation and evaluation of a model
that was loaded with it are untouched.
H heads, T tokens of a row, S keys, D head size.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlt.models.cpu_attention import Scores, block_attention

NAME = "shared_prefix"


class Branch(NamedTuple):
    """Tokens [start, end) of a row, and where the tokens before them in their sequence stand, in order."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SharedPrefixLayout:
    """The branches of one packed row, depth first and without a gap; tokens after the last are padding."""

    branches: tuple[Branch, ...]
    length: int

    def subtree_ends(self) -> torch.Tensor:
        """(T,): for each token, the end of the tokens that continue it. They follow directly; no others look at it."""
        ends_T = torch.arange(1, self.length + 1)
        for start, end, before in self.branches:
            for first, last in (*before, (start, end)):
                ends_T[first:last] = end
        return ends_T

    def positions(self) -> torch.Tensor:
        """(T,): for each token, how many tokens its sequence has before it; zeros for padding."""
        positions_T = torch.zeros(self.length, dtype=torch.long)
        for start, end, before in self.branches:
            first = sum(stop - begin for begin, stop in before)
            positions_T[start:end] = torch.arange(first, first + end - start)
        return positions_T

    def may_look(self, device: torch.device, window: int | None = None):
        """FlexAttention's rule: which key a query looks at. A window counts the query itself."""
        ends_T = self.subtree_ends().to(device)
        if window is None:
            return lambda batch, head, query, key: (key <= query) & (query < ends_T[key])
        positions_T = self.positions().to(device)

        def rule(batch, head, query, key):
            near = positions_T[query] - positions_T[key] < window
            return (key <= query) & (query < ends_T[key]) & near

        return rule


@cache
def _compiled_block_mask():
    # The eager form writes the whole T x T mask before it looks at blocks.
    return torch.compile(create_block_mask)


@lru_cache(maxsize=64)  # each layer asks again, and a checkpointed one on its way back
def block_mask(layout: SharedPrefixLayout, device: torch.device, window: int | None = None) -> BlockMask:
    """For FlexAttention, which computes only the blocks in which some query looks at some key."""
    rule = layout.may_look(device, window)
    return _compiled_block_mask()(rule, None, None, layout.length, layout.length, device=device)


def shared_prefix_attention(
    module, query, key, value, attention_mask, layout: SharedPrefixLayout | None = None, **kwargs
):
    """transformers' attention signature; `query` (1, H, T, D), returns (1, T, H, D) and None for the weights.

    Of its keywords, `scaling`, `sliding_window`, `softcap` (Gemma 2) and `s_aux` (one sink per head: gpt-oss) count.
    """
    placeholder = attention_mask is not None and attention_mask.numel() == 1
    if key.shape[2] > 1 and placeholder != (layout is not None):
        raise RuntimeError(f"{type(module).__name__} lost the packed row's layout, or brought a mask of its own")
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if layout is None:
        if softcap is None and sinks is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return _masked_attention(module, query, key, value, attention_mask, softcap, sinks, scale), None
    window = _window(module, kwargs)
    if query.device.type == "cuda":
        mask = block_mask(layout, query.device, window)
        return flex_attention_forward(module, query, key, value, mask, **kwargs)[0], None
    return block_attention(query, key, value, layout.branches, Scores(scale, window, softcap), sinks), None


def _window(module, kwargs) -> int | None:
    """The window that a layer passes on, which must be there if the model's configuration says that it has one."""
    window = kwargs.get("sliding_window")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if kinds and window is None and kinds[module.layer_idx] == "sliding_attention":
        raise RuntimeError(f"{type(module).__name__} does not say its sliding window")
    return window


def _masked_attention(module, query, key, value, attention_mask, softcap, sinks, scale: float) -> torch.Tensor:
    """(B, T, H, D): attention with a soft cap or sinks, which SDPA leaves out, under SDPA's mask (none: causal)."""
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores_BHTS = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if attention_mask is None:
        t, s = scores_BHTS.shape[-2:]
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    scores_BHTS = scores_BHTS.masked_fill(~attention_mask, torch.finfo(scores_BHTS.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores_BHTS.shape[:-1], 1)
        scores_BHTS = torch.cat([scores_BHTS, column.to(scores_BHTS.dtype)], dim=-1)
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    probs_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=exact).to(query.dtype)[..., : key.shape[2]]
    return (probs_BHTS @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
