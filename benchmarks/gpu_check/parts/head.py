"""The output head (rlt/logprobs/head.py) against log-softmax over whole logits: values, gradients, seconds, memory."""

from collections.abc import Callable

import torch

from benchmarks.gpu_check.measures import forget_peak, held_gib, peak_gib, seconds_of
from benchmarks.gpu_check.random_models import random_model
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import Sizes
from rlt.logprobs.head import head_log_probs

TEMPERATURE = 0.7
REPEATS = 3
BOUNDS = {"bfloat16": (0.1, 0.05), "float32": (1e-3, 1e-3)}  # nats at worst; of the gradients' norm


def ours(model, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return head_log_probs(model, hidden_NH, targets_N, TEMPERATURE, "none")[0]


def plain(model, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    logits_NV = model.get_output_embeddings()(hidden_NH).float() / TEMPERATURE
    return torch.log_softmax(logits_NV, dim=-1).gather(1, targets_N[:, None]).squeeze(1)


def measure(compute: Callable, model, hidden_NH, targets_N, device: str) -> tuple[list[torch.Tensor], dict]:
    """Log-probs and both gradients, and what a forward and backward pass takes."""
    weight = model.get_output_embeddings().weight
    found: list[torch.Tensor] = []

    def both_ways() -> None:
        hidden_NH.grad = weight.grad = None
        log_probs_N = compute(model, hidden_NH, targets_N)
        log_probs_N.mean().backward()
        found[:] = [log_probs_N.detach(), hidden_NH.grad, weight.grad]

    both_ways()
    forget_peak(device)
    before = held_gib(device)
    seconds = min(seconds_of(device, both_ways) for _ in range(REPEATS))
    return [x.float().cpu() for x in found], {"seconds": seconds, "peak_gib": peak_gib(device) - before}


def run(record: Record, sizes: Sizes, device: str) -> None:
    for name, (worst, share) in BOUNDS.items():
        dtype = getattr(torch, name)
        model = random_model(sizes.head, device, dtype)
        hidden_NH = torch.randn(sizes.head_positions, sizes.head.hidden, device=device, dtype=dtype, requires_grad=True)
        targets_N = torch.randint(sizes.head.vocabulary, (sizes.head_positions,), device=device)
        (values, *grads), cost = measure(ours, model, hidden_NH, targets_N, device)
        record.add(**{name: {"ours": cost}})
        (expected, *wanted), plain_cost = measure(plain, model, hidden_NH, targets_N, device)
        gap = (values - expected).abs()
        of_grads = [((a - b).norm() / b.norm()).item() for a, b in zip(grads, wanted, strict=True)]
        gaps = {"worst_gap_nats": gap.max().item(), "mean_gap_nats": gap.mean().item()}
        of_both = {"hidden_gradient_gap": of_grads[0], "weight_gradient_gap": of_grads[1]}
        record.add(**{name: {"ours": cost, "plain": plain_cost, **gaps, **of_both}})
        record.claim(f"{name}: log-probs within {worst} nats", gaps["worst_gap_nats"] < worst)
        record.claim(f"{name}: gradients within {share}", max(of_grads) < share)
