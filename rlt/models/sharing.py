"""How a model reads packed rows: which of its layers can read a tree of sequences, decided in one place.

`tree`: every layer reads the packed row (attention.py), sliding windows and all.
`tree and rows`: recurrent layers read each sequence whole, on rows of their own (recurrent.py); attention, experts,
embedding and head read the packed row.
`rows`: one padded row per sequence, through the model as transformers has it.
"""

from typing import Literal, NamedTuple

from transformers import PreTrainedModel

from rlt.models.attention import NAME
from rlt.models.recurrent import RECURRENT, recurrent_mixers

# Architectures whose layers do not hand keyword arguments on, or bring a mask of their own.
WITHOUT_LAYOUT = frozenset({"nemotron", "doge", "moshi", "recurrent_gemma"})
# Those whose layers do not tell the attention of their window, or mean another thing by it.
HIDDEN_WINDOW = frozenset({"phimoe", "qwen2_moe", "modernbert-decoder"})
ON_THE_TREE = frozenset({"full_attention", "sliding_attention"})
WITHOUT_MEMORY = frozenset({"moe", "mlp"})  # Nemotron-H counts these among its layers


class Reading(NamedTuple):
    """How a model reads sequences, and why not all of it on a packed row (empty if all)."""

    way: Literal["tree", "tree and rows", "rows"]
    reason: str = ""


def way_of_reading(model: PreTrainedModel) -> Reading:
    """How a model reads sequences; the rest of the project asks here, and nowhere else looks at kinds of layers."""
    attention = model.config.get_text_config()._attn_implementation
    return way_of_layers(model) if attention == NAME else Reading("rows", f"{attention} attention")


def way_of_layers(model: PreTrainedModel) -> Reading:
    """How a model's layers can read sequences, whatever attention it was loaded with."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - WITHOUT_MEMORY
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    recurrent = kinds - ON_THE_TREE
    if dropout:
        return Reading("rows", f"attention has a dropout of {dropout}")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return Reading("rows", "attention that looks ahead")
    if recurrent == {"linear_attention"} and config.model_type in RECURRENT and recurrent_mixers(model):
        return Reading("tree and rows", "its recurrent layers read each sequence from its first token")
    if recurrent:
        return Reading("rows", f"layers of kind {', '.join(sorted(recurrent))}")
    # Sinks alone make transformers say that a model cannot do SDPA; FlexAttention takes a mask in their presence too.
    if not model._supports_attention_backend or not (model._supports_sdpa or model._supports_flex_attn):
        return Reading("rows", "attention that is not transformers' interface")
    if config.model_type in WITHOUT_LAYOUT:
        return Reading("rows", "layers that bring a mask of their own")
    windows = "sliding_attention" in kinds or not hasattr(config, "layer_types")
    if windows and getattr(config, "sliding_window", None) and config.model_type in HIDDEN_WINDOW:
        return Reading("rows", "a sliding window that its attention is not told of")
    return Reading("tree")
