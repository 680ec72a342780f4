"""How far the engine that writes completions and the policy that trains on them are apart.

Both read the same tokens, rounded differently; an importance ratio is pi(token) / mu(token) of the policy and the
engine, for a token or, in the `sequence_*` modes of TRL's correction, for a whole completion.
B completions, T tokens.
"""

import logging
from collections.abc import Callable, Sequence

import torch

GREATEST_GAP = 0.25  # nats a token on average: above it something is broken
GREATEST_GROWTH = 3.0  # times the gap of a process' first step, whose weights have just arrived
FIRST_GAP = 0.06  # nats a token, at a process' first step: rounding to bfloat16 makes 0.017 to 0.025
NOISE = 1e-3  # nats a token, which small batches reach in float32

logger = logging.getLogger("rlt")


class MismatchAlarm:
    """Warns when the engine seems to hold other weights than the trainer.

    An engine that gets no new weights falls behind by little at each step, and is found by its growth: weights that
    were ten steps old differed by 0.107 nats a token where fresh ones differ by 0.017 to 0.025. One that never got any
    in this process, such as that of a continued run, is found by its first step.

    Args:
        rounds: whether one of both computes in fewer bits than float32.
    """

    def __init__(self, rounds: bool = True):
        self.first: float | None = None
        self.greatest_first = FIRST_GAP if rounds else GREATEST_GROWTH * NOISE

    def check(self, gaps: Sequence[float]) -> None:
        """Look at the mean gaps of a step, in nats a token."""
        if not gaps:
            return
        gap = max(gaps)
        if self.first is None:
            self.first, limit = gap, self.greatest_first
        else:  # a first gap that was no rounding is not what later ones are measured by
            limit = min(GREATEST_GAP, max(NOISE, GREATEST_GROWTH * min(self.first, self.greatest_first)))
        if gap > limit:
            logger.warning(
                "engine and trainer differ by %.4f nats per token on average (at first %.4f, alarm above %.4f): the "
                "engine may hold other weights, or sample in a coarser dtype",
                gap,
                self.first,
                limit,
            )


def importance_figures(batch: dict, mode: str, bounds: tuple[float | None, float | None], gather: Callable) -> dict:
    """What the correction makes of a batch's importance ratios.

    Args:
        batch: of TRL, with `old_per_token_logps`, `sampling_per_token_logps` and `completion_mask` (B, T), and the
            weights that it trains with, `importance_sampling_ratio` (B, T) or (B, 1).
        mode: `vllm_importance_sampling_mode`.
        bounds: the least and the greatest ratio that stays as it is; None is no bound.
        gather: sums of all ranks, stacked, from this rank's (4,).

    Returns:
        `outside`, the share of ratios beyond the bounds, which `*_mask` modes drop and `*_truncate` modes cut; and
        `effective_sample_size` (sum w)² / (n sum w²), the share of the n weights that an average over as many equal
        ones would need (Kong 1992).
    """
    mask_BT = batch["completion_mask"].bool()
    log_ratios_BT = ((batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask_BT).nan_to_num(nan=0.0)
    weights = batch["importance_sampling_ratio"]
    if mode.startswith("sequence"):
        log_ratios, weights = log_ratios_BT.sum(1), weights.flatten()
    else:
        log_ratios, weights = log_ratios_BT[mask_BT], weights[mask_BT]
    low, high = bounds
    ratios = log_ratios.double().exp()
    outside = (ratios < (low or 0.0)) | (ratios > (float("inf") if high is None else high))
    weights = weights.double()
    sums = torch.stack([weights.sum(), weights.square().sum(), outside.sum().double(), torch.ones_like(weights).sum()])
    total, squares, beyond, count = gather(sums).view(-1, 4).sum(0).tolist()
    if not count:
        return {}
    return {"outside": beyond / count, "effective_sample_size": total**2 / (count * squares) if squares else 0.0}
