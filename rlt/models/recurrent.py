"""Recurrent layers (state space, gated delta rule) of a model that otherwise reads packed rows.

A recurrent state runs along its row, so a tree of sequences cannot be one row to it. transformers' fused kernels take
boundaries between sequences (`cu_seqlens`, `seq_idx`); its PyTorch forms drop them without a word. So these layers get
each sequence whole, from its first token, on a padded row of its own, and their outputs go back to the packed row: of a
token that several sequences share, from one of them, as it is the same in all. Everything else in the model (attention,
experts, embedding, head) still computes a shared token once.
B sequences of a row, L tokens of the longest, T tokens of the packed row, H hidden size.
"""

import inspect
from functools import cache, lru_cache

import torch
from transformers import PreTrainedModel

from rlt.models.attention import SharedPrefixLayout

# Architectures that were read so in tests/test_families.py, with one recurrent mixer in each such layer.
RECURRENT = frozenset(
    {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "nemotron_h", "granitemoehybrid", "bamba"}
)


@cache
def _is_recurrent(kind: type[torch.nn.Module]) -> bool:
    """transformers' recurrent mixers, and no other layers, take the cache under this name."""
    return "cache_params" in inspect.signature(kind.forward).parameters


def recurrent_mixers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """One of each layer of kind `linear_attention`; empty if they cannot be told."""
    kinds = model.config.get_text_config().layer_types
    mixers = [
        module
        for module in model.base_model.modules()
        if _is_recurrent(type(module)) and not isinstance(module, PreTrainedModel)
    ]
    return mixers if len(mixers) == kinds.count("linear_attention") else []


def past_adapters(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers whose weights Mamba's fused kernel reads itself, past any adapter on them."""
    is_mamba = {"A_log", "D"}.issubset
    modules = model.named_modules()
    return [f"{name}.out_proj" for name, module in modules if is_mamba(dict(module.named_parameters(recurse=False)))]


def let_recurrent_layers_read_rows(model: PreTrainedModel) -> None:
    """Once for a model; a forward pass without a layout is as before."""
    for mixer in recurrent_mixers(model):
        if not hasattr(mixer, "packed_layout"):
            mixer.register_forward_pre_hook(_to_rows, with_kwargs=True)
            mixer.register_forward_hook(_to_packed_row)
            mixer.__dict__["packed_layout"] = None


def _to_rows(mixer, args, kwargs):
    # Hooks and their attribute are copied with a module; so it is the module that remembers.
    mixer.packed_layout = layout = kwargs.pop("layout", None)
    if layout is None:
        return args, kwargs
    hidden_1TH = args[0] if args else kwargs.pop("hidden_states")
    places_BL, _ = _places(layout, hidden_1TH.device)
    # Gradients of what many sequences begin with are added up in float32.
    exact = torch.promote_types(hidden_1TH.dtype, torch.float32)
    rows_BLH = hidden_1TH[0].to(exact).index_select(0, places_BL.flatten()).to(hidden_1TH.dtype)
    return (rows_BLH.view(*places_BL.shape, -1), *args[1:]), kwargs


def _to_packed_row(mixer, args, output_BLH):
    if mixer.packed_layout is None:
        return output_BLH
    _, back_T = _places(mixer.packed_layout, output_BLH.device)
    mixer.packed_layout = None
    return output_BLH.flatten(0, 1).index_select(0, back_T)[None]


@lru_cache(maxsize=64)
def _places(layout: SharedPrefixLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L): where the tokens of each sequence stand in the packed row, padded on the right, where a recurrence does
    not look; and (T,): where each token of the packed row stands in these rows, laid end to end."""
    continued = {place for branch in layout.branches for place in branch.before}
    paths = [
        [place for start, end in (*branch.before, (branch.start, branch.end)) for place in range(start, end)]
        for branch in layout.branches
        if (branch.start, branch.end) not in continued
    ]
    width = max(len(path) for path in paths)
    back_T = torch.zeros(layout.length, dtype=torch.long)
    for row, path in enumerate(paths):
        back_T[path] = torch.arange(row * width, row * width + len(path))
    places_BL = torch.tensor([path + [path[-1]] * (width - len(path)) for path in paths])
    return places_BL.to(device), back_T.to(device)
