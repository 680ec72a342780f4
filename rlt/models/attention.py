"""Attention over a packed row in which sequences share their beginnings.

A row is a tree of tokens, depth first: branch after branch. A branch is the rest of a sequence whose first tokens stand
earlier in the row. A token looks at these first tokens, and at its branch up to itself. So no mask over all pairs of
the row is needed: on the CPU each branch is a few small products (cpu_attention.py), on a GPU the row is one call of
FlexAttention with a block mask (arXiv 2412.05496). Computing a shared prefix apart from what follows it is the idea of
cascade inference (arXiv 2402.05099), here with gradients and for any depth.

Registered with transformers as `shared_prefix`; without a layout it is SDPA, so generation and evaluation of a model
that was loaded with it are untouched.
H heads, T tokens of a row, D head size.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlt.models.cpu_attention import block_attention

NAME = "shared_prefix"
# Architectures whose layers do not hand keyword arguments on, or bring a mask of their own.
WITHOUT_LAYOUT = frozenset({"nemotron", "doge"})


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

    def may_look(self, device: torch.device):
        """FlexAttention's rule: which key a query looks at."""
        ends_T = self.subtree_ends().to(device)

        def rule(batch, head, query, key):
            return (key <= query) & (query < ends_T[key])

        return rule


@cache
def _compiled_block_mask():
    # The eager form writes the whole T x T mask before it looks at blocks.
    return torch.compile(create_block_mask)


@lru_cache(maxsize=64)  # each layer asks again, and a checkpointed one on its way back
def block_mask(layout: SharedPrefixLayout, device: torch.device) -> BlockMask:
    """For FlexAttention, which computes only the blocks in which some query looks at some key."""
    return _compiled_block_mask()(layout.may_look(device), None, None, layout.length, layout.length, device=device)


def shared_prefix_attention(
    module, query, key, value, attention_mask, layout: SharedPrefixLayout | None = None, **kwargs
):
    """transformers' attention signature; `query` (1, H, T, D), returns (1, T, H, D) and None for the weights."""
    placeholder = attention_mask is not None and attention_mask.numel() == 1
    if key.shape[2] > 1 and placeholder != (layout is not None):
        raise RuntimeError(f"{type(module).__name__} lost the packed row's layout, or brought a mask of its own")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cuda":
        return flex_attention_forward(module, query, key, value, block_mask(layout, query.device), **kwargs)[0], None
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return block_attention(query, key, value, layout.branches, scale), None


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether every layer looks at all tokens before, through transformers' attention interface, without dropout.

    Sliding windows and state-space layers see neighbours in the row, not in the sequence.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    return (
        model._supports_sdpa
        and model._supports_attention_backend
        and config.model_type not in WITHOUT_LAYOUT
        and all(kind == "full_attention" for kind in kinds)
        and window is None
        and not dropout
    )


def takes_layout(model: PreTrainedModel) -> bool:
    """Whether a model was loaded so that it can be given a layout."""
    return model.config.get_text_config()._attn_implementation == NAME and can_share_prefixes(model)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
