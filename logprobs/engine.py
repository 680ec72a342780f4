"""Log-probabilities of tokens under a causal model: policy, reference, student and teacher all come through here.

The output head runs only on the positions that count, in chunks, with the log-sum-exp in float32; on the backward
pass a chunk's logits are computed again instead of kept.
N positions that count, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from logprobs.packing import batch_packs, lay_out, pack_group

HEAD_CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in float32


def _causal_model(model) -> PreTrainedModel:
    """The Hugging Face model inside an adapter (whose layers stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logit_transform(config) -> tuple[float, float | None]:
    """The factor on the logits and the soft cap that some architectures apply after their head."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None):
        scale = 1 / config.logits_scaling
    return (1.0 if scale is None else scale), getattr(config, "final_logit_softcapping", None)


def _head_chunk(head, hidden_NH, targets_N, scale: float, cap: float | None, entropy: str):
    """(N,) log-probs of the targets and (N,) entropies (zeros unless asked for), in float32 or finer."""
    logits_NV = head(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    if scale != 1.0:
        logits_NV = logits_NV * scale
    normaliser_N = logits_NV.logsumexp(dim=-1)
    log_probs_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - normaliser_N
    if entropy == "none":
        return log_probs_N, torch.zeros_like(log_probs_N)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "with_grad"):
        probs_NV = torch.exp(logits_NV - normaliser_N[:, None])
        return log_probs_N, normaliser_N - (probs_NV * logits_NV).sum(-1)


def _head(model: PreTrainedModel, hidden_NH, targets_N, temperature: float, entropy: str):
    head = model.get_output_embeddings()
    factor, cap = _logit_transform(model.config)
    # A soft cap comes after the architecture's factor and before the temperature.
    hidden_NH = hidden_NH * factor if factor != 1.0 else hidden_NH
    args = (1.0 / temperature, cap, entropy)
    rows = max(1, HEAD_CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    chunks = list(zip(hidden_NH.split(rows), targets_N.split(rows), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [_head_chunk(head, hidden, targets, *args) for hidden, targets in chunks]
    else:
        parts = [
            checkpoint(_head_chunk, head, hidden, targets, *args, use_reentrant=False) for hidden, targets in chunks
        ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def token_log_probs(
    model,
    sequences: list[list[int]],
    counted: list[list[int]],
    groups: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    token_budget: int,
    autocast: AbstractContextManager | None = None,
    entropy: Literal["none", "value", "with_grad"] = "none",
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs of the counted tokens of each sequence, each prefix of a group computed once.

    Args:
        model: a Hugging Face causal model with SDPA attention, or a PEFT model around one; unwrapped.
        sequences: token ids, one list per sequence.
        counted: indices of the tokens wanted, per sequence; index 0 has no log-prob.
        groups: indices of sequences that may share a prefix; together they name each sequence once.
        temperature: the logits are divided by it.
        token_budget: most tokens of one forward pass, padding included; a longer single sequence passes alone.
        autocast: context of the forward pass.
        entropy: whether to compute entropies, and whether gradients flow through them.

    Returns:
        Two lists with one float32 tensor (len(counted[i]),) per sequence: log-probs, and entropies in nats (zeros
        unless asked for). Gradients flow when enabled.
    """
    assert all(0 < i < len(ids) for ids, where in zip(sequences, counted, strict=True) for i in where), (
        "index out of text"
    )
    causal = _causal_model(model)
    device = causal.get_input_embeddings().weight.device
    packs = [pack for group in groups for pack in pack_group(sequences, list(group), token_budget)]
    log_probs: list[torch.Tensor] = [torch.zeros(0, device=device) for _ in sequences]
    entropies = list(log_probs)
    with autocast or nullcontext():
        for batch in batch_packs(packs, token_budget):
            wanted = [
                (row, pack.position(order, i - 1), sequences[member][i])
                for row, pack in enumerate(batch)
                for order, member in enumerate(pack.members)
                for i in counted[member]
            ]
            inputs = lay_out(batch, sequences, device)
            hidden_RTH = causal.base_model(**inputs, use_cache=False).last_hidden_state
            rows, positions, targets = torch.tensor(wanted, device=device, dtype=torch.long).view(-1, 3).unbind(1)
            flat = _head(causal, hidden_RTH[rows, positions], targets, temperature, entropy)
            members = [member for pack in batch for member in pack.members]
            sizes = [len(counted[member]) for member in members]
            for store, values in zip((log_probs, entropies), flat, strict=True):
                for member, part in zip(members, values.split(sizes), strict=True):
                    store[member] = part
    return log_probs, entropies
