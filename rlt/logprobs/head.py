"""The output head on the positions that count: log-probs and entropies without a whole tensor of tokens x vocabulary.

On a GPU this is TRL's fused kernel. On the CPU that kernel goes over memory in plain passes and multiplies gradients in
float32. There a chunk of positions is multiplied by the head at once, and the next operations (scale, log-softmax,
entropy) run on blocks that fit a processor's cache. On the backward pass a chunk's logits are computed again instead
of kept, as in arXiv 2410.10989 (Liger) and 2411.09009 (cut cross-entropy).
N positions that count, H hidden size, V vocabulary, K tokens that are asked for at each position.
"""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

HEAD_CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in float32
CPU_BLOCK_ELEMENTS = 2**20  # logits worked on at once on a CPU
GPU_VOCABULARY_CHUNK = 32768  # columns of the head in one tile of TRL's kernel


def head_log_probs(model: PreTrainedModel, hidden_NH, targets_N, temperature: float, entropy: str):
    """Log-probs of the targets, (N,) or (N, K) as they are, and (N,) entropies (zeros unless asked for), in float32 or
    finer.

    With `entropy` "rank" the second is each target's rank (of N alone) instead, 1 for the likeliest; without gradients.
    """
    head = model.get_output_embeddings()
    factor, cap = logit_transform(model.config)
    rows = max(1, HEAD_CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    if type(head) is torch.nn.Linear and is_whole(head):
        plain = hidden_NH, head.weight, head.bias, targets_N
        if hidden_NH.device.type == "cuda" and targets_N.dim() == 1 and entropy != "rank":
            asked = () if entropy == "none" else ("entropy",)
            values = ChunkedLogProbFunction.apply(*plain, temperature, GPU_VOCABULARY_CHUNK, cap, factor, asked)
            entropies = torch.zeros_like(values[0]) if values[1] is None else values[1]
            return values[0], entropies if entropy == "with_grad" else entropies.detach()
        if cap is None and entropy != "with_grad":
            return _LinearHead.apply(*plain, factor / temperature, rows, entropy)
    args = (factor, cap, temperature, entropy)
    pieces = list(zip(hidden_NH.split(rows), targets_N.split(rows), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        parts = [_any_head(head, hidden, targets, *args) for hidden, targets in pieces]
    else:
        parts = [checkpoint(_any_head, head, hidden, targets, *args, use_reentrant=False) for hidden, targets in pieces]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def is_whole(head: torch.nn.Linear) -> bool:
    """Whether the head's weight is here as a whole; ZeRO-3 and FSDP2 hold shards of it between forward passes."""
    return type(head.weight) is torch.nn.Parameter and head.weight.shape == (head.out_features, head.in_features)


def logit_transform(config) -> tuple[float, float | None]:
    """The factor on the logits and the soft cap that some architectures apply after their head.

    The names are those of Cohere, Muse Glimmer, Falcon-H1; Granite divides where HyperCLOVA X multiplies.
    """
    config = config.get_text_config()
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor = next((value for value in factors if value is not None), None)
    if factor is None and getattr(config, "logits_scaling", None):
        factor = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return (1.0 if factor is None else factor), cap


def _any_head(head, hidden_NH, targets_N, factor: float, cap: float | None, temperature: float, entropy: str):
    """Adapters on the head, shards, soft caps and entropies with gradients: plain operations.

    A soft cap comes after the architecture's factor and before the temperature, as in the models.
    """
    logits_NV = head_logits(head, hidden_NH, factor, cap)
    if temperature != 1.0:
        logits_NV = logits_NV * (1.0 / temperature)
    normaliser_N = logits_NV.logsumexp(dim=-1)
    log_probs_NK = logits_NV.gather(-1, _columns(targets_N)) - normaliser_N[:, None]
    log_probs_N = log_probs_NK.view(targets_N.shape)
    if entropy == "none":
        return log_probs_N, torch.zeros_like(log_probs_N)
    if entropy == "rank":
        return log_probs_N, ranks_of(logits_NV, targets_N)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "with_grad"):
        probs_NV = torch.exp(logits_NV - normaliser_N[:, None])
        return log_probs_N, normaliser_N - (probs_NV * logits_NV).sum(-1)


def head_logits(head, hidden_NH, factor: float, cap: float | None) -> torch.Tensor:
    # A call of the module would let ZeRO-3 give back the weight that `_with_whole_head` has gathered.
    plain = type(head) is torch.nn.Linear and is_whole(head)
    logits_NV = torch.nn.functional.linear(hidden_NH, head.weight, head.bias) if plain else head(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if factor != 1.0:
        logits_NV = logits_NV * factor
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV


def ranks_of(values_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """(N,) 1 + how many tokens have more than the target, of logits or log-probs; ties share the better rank."""
    return 1.0 + (values_NV > values_NV.gather(-1, targets_N[:, None])).sum(-1)


def best_tokens(logits_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probs (T, k), the likeliest first."""
    values_Tk, ids_Tk = logits_TV.float().topk(min(k, logits_TV.shape[-1]))
    return ids_Tk, values_Tk - logits_TV.float().logsumexp(dim=-1, keepdim=True)


@torch.no_grad()
def head_best_tokens(model: PreTrainedModel, hidden_NH, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of positions whose logits are never held all at once."""
    head, transform = model.get_output_embeddings(), logit_transform(model.config)
    rows = max(1, HEAD_CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    parts = [best_tokens(head_logits(head, hidden, *transform), k) for hidden in hidden_NH.split(rows)]
    ids, values = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(values)


def _columns(targets: torch.Tensor) -> torch.Tensor:
    """(N, K) of (N,) or (N, K) targets."""
    return targets if targets.dim() == 2 else targets[:, None]


class _LinearHead(torch.autograd.Function):
    """Log-probs (with gradients) and entropies or ranks (without) of a linear head."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, scale: float, rows: int, entropy: str):
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        with torch.autocast(device, enabled=False):
            low_NH, low_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
            low_V = None if bias_V is None else bias_V.to(dtype)
            exact = torch.promote_types(dtype, torch.float32)
            log_probs_NK = hidden_NH.new_zeros(_columns(targets_N).shape, dtype=exact)
            entropies_N = hidden_NH.new_zeros(len(targets_N), dtype=exact)
            for start, logits_CV in chunks(low_NH, low_VH, low_V, rows):
                for block in blocks(logits_CV, start):
                    values_BV = log_softmax(logits_CV[block.start - start : block.stop - start], scale)
                    log_probs_NK[block] = values_BV.gather(-1, _columns(targets_N[block]))
                    if entropy == "rank":
                        entropies_N[block] = ranks_of(values_BV, targets_N[block])
                    elif entropy == "value":
                        entropies_N[block] = -torch.linalg.vecdot(values_BV.exp(), values_BV)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        ctx.dtype, ctx.scale, ctx.rows = dtype, scale, rows
        ctx.mark_non_differentiable(entropies_N)
        return log_probs_NK.view(targets_N.shape), entropies_N

    @staticmethod
    def backward(ctx, *grads):
        grad_N, _ = grads
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        low_NH, low_VH = hidden_NH.to(ctx.dtype), weight_VH.to(ctx.dtype)
        low_V = None if bias_V is None else bias_V.to(ctx.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_VH = torch.zeros_like(weight_VH) if needs_weight else None
        grad_V = torch.zeros_like(bias_V) if needs_bias else None
        for start, logits_CV in chunks(low_NH, low_VH, low_V, ctx.rows):
            for block in blocks(logits_CV, start):
                here = slice(block.start - start, block.stop - start)
                # d log p(target) / d logits = scale (one-hot - softmax)
                values_BV = log_softmax(logits_CV[here], ctx.scale).exp_()
                factors_BK = _columns(grad_N[block] * ctx.scale)
                values_BV.mul_(-factors_BK.sum(-1, keepdim=True))
                values_BV.scatter_add_(-1, _columns(targets_N[block]), factors_BK.to(values_BV.dtype))
                logits_CV[here] = values_BV
            inside = slice(start, start + len(logits_CV))
            if grad_NH is not None:
                grad_NH[inside] = logits_CV @ low_VH
            if grad_VH is not None:
                grad_VH += logits_CV.T @ low_NH[inside]
            if grad_V is not None:
                grad_V += logits_CV.sum(0)
        return grad_NH, grad_VH, grad_V, None, None, None, None


def chunks(hidden_NH, weight_VH, bias_V, rows: int):
    """Where each chunk begins, and its logits, which the caller may overwrite."""
    for start in range(0, len(hidden_NH), rows):
        yield start, torch.nn.functional.linear(hidden_NH[start : start + rows], weight_VH, bias_V)


def blocks(logits_CV, start: int):
    """Slices of the N positions, in pieces of a chunk that are worked on at once."""
    size = len(logits_CV)
    step = max(1, CPU_BLOCK_ELEMENTS // logits_CV.shape[-1]) if logits_CV.device.type == "cpu" else size
    for first in range(0, size, step):
        yield slice(start + first, start + min(first + step, size))


def log_softmax(logits_BV, scale: float) -> torch.Tensor:
    values_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    return torch.log_softmax(values_BV * scale if scale != 1.0 else values_BV, dim=-1)
