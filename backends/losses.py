"""Losses as pure functions of log-probs; each is a plain sum over tokens, so that calls and micro-batches add up.

A function of tokens gives the loss of each token. `logprobs` are those that the tokens were sampled with, `advantages`
how much better they did than expected; both are zeros on prompts. r = exp(log_probs - logprobs) is computed where an
advantage is not 0, and is 1 elsewhere: a prompt has no sampling log-probs that could be compared.
Arguments before the star are `Datum.loss_inputs` by name, those behind it are keys of `loss_fn_config`.
N tokens of a sequence, K targets at each.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlt.errors import Refused

IGNORED = -100  # a label that is not learned, as transformers has it
OUTPUT_LOSSES = ("causal_lm",)


def cross_entropy(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """-w log p, of (N,) or (N, K) targets; weights of any sign and size, 1 where none are given."""
    if weights is None:
        return -log_probs
    return -torch.where(weights != 0, weights * log_probs, 0.0)


def importance_sampling(log_probs: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-r A: REINFORCE on samples of another policy."""
    return -_ratio(log_probs, logprobs, advantages) * advantages


def ppo(
    log_probs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """-min(r A, clip(r) A) (arXiv 1707.06347, eq. 7); the thresholds bound r itself."""
    ratio = _ratio(log_probs, logprobs, advantages)
    return -_pessimistic(ratio, advantages, clip_low_threshold, clip_high_threshold)


def cispo(
    log_probs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """-clip(r) A log p without gradients through r (arXiv 2506.13585, eq. 4), so that clipped tokens still learn."""
    ratio = _ratio(log_probs, logprobs, advantages).detach().clamp(clip_low_threshold, clip_high_threshold)
    return -ratio * advantages * log_probs


def dro(log_probs: Tensor, logprobs: Tensor, advantages: Tensor, *, beta: float = 0.05) -> Tensor:
    """-(A log p - beta/2 (log p - log q)^2) (arXiv 2405.19107); the square where a token was sampled: A or log q is
    not 0."""
    sampled = (advantages != 0) | (logprobs != 0)
    distance = torch.where(sampled, log_probs - logprobs, 0.0)
    return -(advantages * log_probs - 0.5 * beta * distance.square())


def gspo(
    log_probs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    sequence_ratio_mask: Tensor,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """As ppo, with one ratio for the sequence, the geometric mean over the mask; each token's gradient is its own
    (GSPO-token, arXiv 2507.18071, eq. 13)."""
    counted = sequence_ratio_mask != 0
    log_ratios = torch.where(counted, sequence_ratio_mask * (log_probs - logprobs), 0.0).detach()
    ratio = torch.exp(log_ratios.sum() / sequence_ratio_mask.sum()) if counted.any() else log_ratios.new_ones(())
    ratios = ratio * torch.exp(log_probs - log_probs.detach())
    return -_pessimistic(ratios, advantages, clip_low_threshold, clip_high_threshold)


def grpo(
    log_probs: Tensor,
    advantages: Tensor,
    logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
) -> Tensor:
    """-min(r A, clip(r) A) + beta r (exp(d) - d - 1), d = reference - policy (arXiv 2402.03300, eq. 3 and 4).

    The r of the last term, whose gradient is there even where its value is 1, makes it that of the reverse KL (arXiv
    2512.02556).

    Args:
        logprobs: none: the policy's own, for the one update of fresh samples.
        weights: of each token: 0 on prompts, and elsewhere 1 over what the sum is to be divided by. Without a beta they
            may be left out, as a prompt's advantages are 0.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].
    """
    counted = torch.ones_like(log_probs) if weights is None else weights
    old = log_probs.detach() if logprobs is None else logprobs
    ratio = _ratio(log_probs, old, counted if beta else advantages * counted)
    loss = -_pessimistic(ratio, advantages, 1 - epsilon, 1 + epsilon_high)
    if beta:
        if ref_logprobs is None:
            raise Refused(f"loss_fn=grpo with beta={beta} needs ref_logprobs among the loss inputs")
        away = torch.where(counted != 0, ref_logprobs - log_probs, 0.0)
        loss = loss + beta * ratio * (torch.exp(away) - away - 1)
    return counted * loss


def dpo(
    log_probs: Sequence[Tensor],
    ref_logprobs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    beta: float = 0.1,
) -> Tensor:
    """-log sigmoid(beta (d_chosen - d_rejected)) of each pair (arXiv 2305.18290, eq. 7), d = sum w (log p - log ref).

    Args:
        log_probs: sequences, two and two: the chosen one, then the rejected one.
    """
    weights = [torch.ones_like(values) for values in log_probs] if weights is None else weights
    rows = zip(log_probs, ref_logprobs, weights, strict=True)
    gains = torch.stack([torch.where(w != 0, w * (policy - ref), 0.0).sum() for policy, ref, w in rows])
    return -torch.nn.functional.logsigmoid(beta * (gains[0::2] - gains[1::2]))


def additive(loss: Callable) -> Callable:
    """Mark a function whose loss of a batch is the sum of those of its parts: a batch may be read in several passes,
    one after the other, and each gone back from at once."""
    loss.additive = True  # pyrefly: ignore[missing-attribute]
    return loss


@additive
def compute_loss_from_outputs(outputs, labels: Tensor, kind: str = "causal_lm") -> Tensor:
    """The loss of a model's outputs, apart from the pass that made them: a sum over tokens.

    Args:
        outputs: with `logits` (B, T, V).
        labels: (B, T) tokens of the input, `IGNORED` where nothing is to be learned; each is predicted from before.
        kind: "causal_lm".

    Raises:
        Refused: another kind.
    """
    if kind not in OUTPUT_LOSSES:
        raise Refused(f"a loss of kind {kind!r} is not known: {', '.join(OUTPUT_LOSSES)} would do")
    logits_BTV = outputs.logits[:, :-1]
    exact = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _ratio(log_probs: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    return torch.exp(torch.where(advantages != 0, log_probs - logprobs, 0.0))


def _pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
