"""How far a student's next-token distribution is from a teacher's, from the hidden states and output heads of both.

The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1), with the `beta` of TRL's
`DistillationTrainer`: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher), and between them
beta KL(teacher || m) + (1 - beta) KL(student || m) with m = (1 - beta) student + beta teacher. It runs over the whole
vocabulary, or over the student's k likeliest tokens and one bucket for all others, as in SDPO (arXiv 2601.20802).
Gradients flow to the student alone.

As in head.py, logits are made in chunks of positions, and made again on the backward pass instead of kept.
N positions, H hidden size of the student, G of the teacher, V vocabulary, B positions of a block, C of a chunk.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from rlt.logprobs.head import (
    HEAD_CHUNK_ELEMENTS,
    blocks,
    chunks,
    head_logits,
    is_whole,
    log_softmax,
    logit_transform,
)

LEAST_TAIL = 1e-7  # of the probability outside the k likeliest, so that its log is finite


@dataclass(frozen=True)
class Divergence:
    """Which divergence is taken.

    Attributes:
        beta: 0 forward KL, 1 reverse KL, between them Jensen-Shannon.
        temperature: the logits of both models are divided by it.
        top_k: of the student's likeliest tokens; None: the whole vocabulary.
    """

    beta: float
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's output head, which stays on the device while the teacher itself may wait elsewhere.

    Attributes:
        weight_VG, bias_V: of the linear head.
        factor, cap: on the logits, as `logit_transform` has them.
    """

    weight_VG: torch.Tensor
    bias_V: torch.Tensor | None
    factor: float
    cap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TeacherHead":
        """Of a model whose head is whole where it is asked: a loaded one's, or that of a pass at hand."""
        head: Any = model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.detach()
        return cls(head.weight.detach(), bias, *logit_transform(model.config))


def divergence_of(log_s_BV: torch.Tensor, log_t_BV: torch.Tensor, beta: float) -> torch.Tensor:
    """(B,) divergences in nats of log-probs over one support, which the last dimension is."""
    if beta == 0.0:
        return torch.linalg.vecdot(log_t_BV.exp(), log_t_BV - log_s_BV)
    if beta == 1.0:
        return torch.linalg.vecdot(log_s_BV.exp(), log_s_BV - log_t_BV)
    log_m_BV = _mixture(log_s_BV, log_t_BV, beta)
    of_teacher_B = torch.linalg.vecdot(log_t_BV.exp(), log_t_BV - log_m_BV)
    of_student_B = torch.linalg.vecdot(log_s_BV.exp(), log_s_BV - log_m_BV)
    return beta * of_teacher_B + (1 - beta) * of_student_B


def _mixture(log_s_BV: torch.Tensor, log_t_BV: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(log_s_BV + math.log1p(-beta), log_t_BV + math.log(beta))


def _gradient(log_s_BV: torch.Tensor, log_t_BV: torch.Tensor, beta: float) -> torch.Tensor:
    """d divergence / d logits of the student, (B, V); of a KL from p, p (log-ratio - KL)."""
    if beta == 0.0:
        return log_s_BV.exp() - log_t_BV.exp()
    ratio_BV = log_s_BV - (log_t_BV if beta == 1.0 else _mixture(log_s_BV, log_t_BV, beta))
    probs_BV = log_s_BV.exp()
    mean_B1 = torch.linalg.vecdot(probs_BV, ratio_BV)[:, None]
    grad_BV = probs_BV.mul_(ratio_BV.sub_(mean_B1))
    return grad_BV if beta == 1.0 else grad_BV.mul_(1 - beta)


def likeliest_and_rest(log_s_BV: torch.Tensor, log_t_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both distributions over the student's k likeliest tokens and the rest of the vocabulary as one token, (B, k + 1).

    A student's own likeliest tokens are those it may come to write, and those that a reverse KL weighs; the rest as one
    token keeps the divergence one of whole distributions, and no larger than over the vocabulary.
    """
    places_Bk = log_s_BV.detach().topk(k).indices

    def coarse(log_probs_BV: torch.Tensor) -> torch.Tensor:
        likeliest_Bk = log_probs_BV.gather(-1, places_Bk)
        inside_B1 = likeliest_Bk.logsumexp(-1, keepdim=True).clamp(max=-LEAST_TAIL)
        return torch.cat([likeliest_Bk, torch.log(-torch.expm1(inside_B1))], dim=-1)

    return coarse(log_s_BV), coarse(log_t_BV)


def head_divergences(
    model: PreTrainedModel, hidden_NH, teacher: TeacherHead | None, teacher_hidden_NG, asked: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) divergences, with gradients, and (N,) entropies of the student, without, in nats.

    Args:
        model: the student.
        teacher: None: the student's own head, as it is now, is the teacher's too.
    """
    head, (factor, cap) = model.get_output_embeddings(), logit_transform(model.config)
    teacher = teacher or TeacherHead.of(model)
    rows = max(1, HEAD_CHUNK_ELEMENTS // len(teacher.weight_VG))
    if type(head) is torch.nn.Linear and is_whole(head) and asked.top_k is None:
        size = min(len(head.weight), len(teacher.weight_VG))
        both = hidden_NH, *_first(size, head.weight, head.bias), teacher_hidden_NG
        both = *both, *_first(size, teacher.weight_VG, teacher.bias_V)
        if hidden_NH.device.type == "cuda":
            of_teacher = teacher.factor, teacher.cap
            return ChunkedDivergenceFunction.apply(*both, asked.beta, asked.temperature, factor, cap, *of_teacher)
        if cap is None and teacher.cap is None:
            scales = factor / asked.temperature, teacher.factor / asked.temperature
            return _LinearHeads.apply(*both, asked.beta, *scales, rows)
    pieces = list(zip(hidden_NH.split(rows), teacher_hidden_NG.split(rows), strict=True))
    args = head, (factor, cap), teacher, asked
    if len(pieces) == 1 or not torch.is_grad_enabled():
        parts = [_any_heads(*piece, *args) for piece in pieces]
    else:
        parts = [checkpoint(_any_heads, *piece, *args, use_reentrant=False) for piece in pieces]
    divergences, entropies = zip(*parts, strict=True)
    return torch.cat(divergences), torch.cat(entropies)


def _first(size: int, weight_VH, bias_V) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of the tokens that both heads have: models of one tokenizer may differ in how many rows lie behind."""
    if len(weight_VH) == size:
        return weight_VH, bias_V
    return weight_VH[:size], None if bias_V is None else bias_V[:size]


def _any_heads(hidden_NH, teacher_hidden_NG, head, transform, teacher: TeacherHead, asked: Divergence):
    """Soft caps, shards and the likeliest tokens: plain operations."""
    logits_NV, (weight_VG, bias_V) = head_logits(head, hidden_NH, *transform), (teacher.weight_VG, teacher.bias_V)
    size = min(logits_NV.shape[-1], len(weight_VG))
    log_s_NV = log_softmax(logits_NV[:, :size], 1 / asked.temperature)
    with torch.no_grad():
        logits_NV = torch.nn.functional.linear(teacher_hidden_NG, *_first(size, weight_VG, bias_V))
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * teacher.factor
        if teacher.cap is not None:
            logits_NV = teacher.cap * torch.tanh(logits_NV / teacher.cap)
        log_t_NV = log_softmax(logits_NV, 1 / asked.temperature)
        entropies_N = -torch.linalg.vecdot(log_s_NV.exp(), log_s_NV)
    if asked.top_k is not None and asked.top_k < log_s_NV.shape[-1]:
        log_s_NV, log_t_NV = likeliest_and_rest(log_s_NV, log_t_NV, asked.top_k)
    return divergence_of(log_s_NV, log_t_NV, asked.beta), entropies_N


class _LinearHeads(torch.autograd.Function):
    """Divergences (with gradients) and the student's entropies (without) of two linear heads on a CPU."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, other_NG, other_VG, other_V, *how):
        device = hidden_NH.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        ctx.how, beta = how, how[0]
        tensors = hidden_NH, weight_VH, bias_V, other_NG, other_VG, other_V
        divergences_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.promote_types(ctx.dtype, torch.float32))
        entropies_N = torch.zeros_like(divergences_N)
        with torch.autocast(device, enabled=False):
            for _, block, log_s_BV, log_t_BV in _log_probs_by_block(_lowered(tensors, ctx.dtype), *how):
                divergences_N[block] = divergence_of(log_s_BV, log_t_BV, beta)
                entropies_N[block] = -torch.linalg.vecdot(log_s_BV.exp(), log_s_BV)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(entropies_N)
        return divergences_N, entropies_N

    @staticmethod
    def backward(ctx, *grads):
        grad_N, (beta, scale, *_) = grads[0], ctx.how
        needed = zip(ctx.saved_tensors[:3], ctx.needs_input_grad, strict=False)
        grad_NH, grad_VH, grad_V = [torch.zeros_like(value) if needs else None for value, needs in needed]
        low = _lowered(ctx.saved_tensors, ctx.dtype)
        for (start, logits_CV, here), block, log_s_BV, log_t_BV in _log_probs_by_block(low, *ctx.how):
            logits_CV[here] = _gradient(log_s_BV, log_t_BV, beta).mul_((grad_N[block] * scale)[:, None])
            if here.stop < len(logits_CV):
                continue  # the chunk has more blocks
            inside = slice(start, start + len(logits_CV))
            if grad_NH is not None:
                grad_NH[inside] = logits_CV @ low[1]
            if grad_VH is not None:
                grad_VH += logits_CV.T @ low[0][inside]
            if grad_V is not None:
                grad_V += logits_CV.sum(0)
        return grad_NH, grad_VH, grad_V, *[None] * 7


def _lowered(tensors, dtype: torch.dtype) -> list:
    return [None if value is None else value.to(dtype) for value in tensors]


def _log_probs_by_block(low: list, beta: float, scale: float, other_scale: float, rows: int):
    """Where a block stands in its chunk (whose logits may be overwritten), its positions, both models' log-probs."""
    ours, theirs = (chunks(hidden, weight, bias, rows) for hidden, weight, bias in (low[:3], low[3:]))
    for (start, logits_CV), (_, other_CV) in zip(ours, theirs, strict=True):
        for block in blocks(logits_CV, start):
            here = slice(block.start - start, block.stop - start)
            log_s_BV, log_t_BV = log_softmax(logits_CV[here], scale), log_softmax(other_CV[here], other_scale)
            yield (start, logits_CV, here), block, log_s_BV, log_t_BV
