"""Attention over a packed row in which the sequences of a group share their prefix.

A row is `prefix + rest_1 + … + rest_G`, group after group. Each rest looks at its prefix and at itself, and where all
prefixes begin alike (a system prompt) at that stem, which stands once at the beginning of the row. So no mask over all
pairs of the row is needed: on the CPU each sequence is a few small products (cpu_attention.py), on a GPU
the row is one call of FlexAttention with a block mask (arXiv 2412.05496). Computing a shared prefix apart from what
follows it is the idea of cascade inference (arXiv 2402.05099), here with gradients.

Registered with transformers as `shared_prefix`; without a layout it is SDPA, so generation and evaluation of a model
that was loaded with it are untouched.
H heads, T tokens of a row, D head size.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.cpu_attention import block_attention

NAME = "shared_prefix"
# Their layers do not hand keyword arguments on, or bring a mask of their own.
WITHOUT_LAYOUT = frozenset({"nemotron", "doge"})


@dataclass(frozen=True)
class Span:
    """A group in a row: where it begins, the length of its prefix and of each rest behind it.

    `stem` tokens at the beginning of the row stand before its prefix, too; 0 for the group that they are part of.
    """

    start: int
    prefix: int
    rests: tuple[int, ...]
    stem: int = 0

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.rests)


@dataclass(frozen=True)
class SharedPrefixLayout:
    """The groups of one packed row, one behind the other; tokens after the last are padding."""

    spans: tuple[Span, ...]
    length: int

    def owners(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each token (T,): its group (-1: padding), its rest within the group (0: the prefix), its stem's length."""
        groups_T = torch.full((self.length,), -1)
        rests_T, stems_T = torch.zeros(2, self.length, dtype=torch.long)
        for number, span in enumerate(self.spans):
            groups_T[span.start : span.end] = number
            stems_T[span.start : span.end] = span.stem
            counts = torch.tensor([span.prefix, *span.rests])
            rests_T[span.start : span.end] = torch.arange(len(counts)).repeat_interleave(counts)
        return groups_T, rests_T, stems_T

    def may_look(self, device: torch.device):
        """FlexAttention's rule: which key a query looks at."""
        groups_T, rests_T, stems_T = (owner.to(device) for owner in self.owners())

        def rule(batch, head, query, key):
            same = (rests_T[key] == 0) | (rests_T[key] == rests_T[query])
            return (key < stems_T[query]) | (groups_T[query] == groups_T[key]) & same & (query >= key)

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
    return block_attention(query, key, value, layout.spans, scale), None


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
