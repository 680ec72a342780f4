"""The attention of packed rows, forward and backward, against one row at a time; and how often it is compiled.

Rows are random trees of sequences of many lengths. On a GPU that is FlexAttention with a block mask, compiled by
torch.compile; on the CPU it is rlt/models/cpu_attention.py, which compiles nothing.
"""

import logging
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch._dynamo import config as dynamo_config

from benchmarks.gpu_check.measures import autocast, compilations, compile_seconds, forget_peak, peak_gib, seconds_of
from benchmarks.gpu_check.random_models import random_model
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import Sizes
from rlt.logprobs import token_log_probs
from rlt.logprobs.packing import BLOCK, fill_rows

FIRST_TOKEN = 300  # behind special tokens and bytes
# In nats at worst and on average, and of the gradients' norm.
BOUNDS = {"float32": (2e-3, 1e-4, 1e-3), "bfloat16": (0.5, 0.05, 0.1), "autocast": (0.5, 0.05, 0.1)}


@dataclass(frozen=True)
class Trees:
    """Sequences of one packed row, and the indices that count."""

    sequences: list[list[int]]
    counted: list[list[int]]

    @property
    def packed(self) -> int:
        """Tokens of the row, padded as on a GPU."""
        (row,) = fill_rows(self.sequences, list(range(len(self.sequences))), 2**30)
        return -(-row.length // BLOCK) * BLOCK


@dataclass
class Layouts:
    """What was measured of each layout: padded length, seconds, compilations so far; and the gaps."""

    rows: list[tuple[int, float, int]] = field(default_factory=list)
    worst: float = 0.0
    means: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    rows_worst: float = 0.0  # of one row at a time, to float32


class LimitHits(logging.Handler):
    """Counts dynamo's warnings that it will compile a function no more, and runs it as it is."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage()


def random_trees(rng: random.Random, sizes: Sizes) -> Trees:
    """A prompt and two to eight completions, some of which begin as another does; of `row_tokens` at most."""

    def tokens(fewest: int, most: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, sizes.attention.vocabulary) for _ in range(rng.randint(fewest, most))]

    most = sizes.row_tokens
    prompt, completions = tokens(8, most // 3), [tokens(4, most // 12)]
    for _ in range(rng.randint(1, 7)):
        before = rng.choice(completions)
        shared = before[: rng.choice((0, 0, rng.randrange(len(before))))]
        completions.append(shared + tokens(4, most // 12))
    sequences = [prompt + completion for completion in completions]
    return Trees(sequences, [list(range(len(prompt), len(ids))) for ids in sequences])


def packed(model, trees: Trees, context) -> torch.Tensor:
    values, _ = token_log_probs(model, trees.sequences, trees.counted, token_budget=2**30, autocast=context)
    return torch.cat(values)


def one_at_a_time(model, trees: Trees, context) -> torch.Tensor:
    found = []
    with context:
        for ids, where in zip(trees.sequences, trees.counted, strict=True):
            ids_T = torch.tensor(ids, device=model.device)
            values_TV = torch.log_softmax(model(ids_T[None]).logits[0, where[0] - 1 : -1].float(), dim=-1)
            found.append(values_TV.gather(1, ids_T[where[0] :, None]).squeeze(1))
    return torch.cat(found)


def gradients(model, log_probs: torch.Tensor) -> torch.Tensor:
    """Of the mean, of all parameters in one."""
    model.zero_grad()
    log_probs.mean().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


def compare(model, exact, trees: Trees, device: str, low: bool, layouts: Layouts) -> None:
    def context():
        return autocast(device) if low else nullcontext()

    ours: list[torch.Tensor] = []

    def both_ways() -> None:
        ours.append(packed(model, trees, context()))
        ours.append(gradients(model, ours[0]))

    seconds = seconds_of(device, both_ways)
    layouts.rows.append((trees.packed, seconds, compilations()))
    theirs = one_at_a_time(model, trees, context())
    gaps = (ours[0] - theirs).detach().abs()
    expected = gradients(model, theirs)
    with torch.no_grad():
        to_float32 = (theirs - one_at_a_time(exact, trees, nullcontext())).abs().max().item()
    layouts.worst = max(layouts.worst, gaps.max().item())
    layouts.means.append(gaps.mean().item())
    layouts.gradients.append(((ours[1] - expected).norm() / expected.norm()).item())
    layouts.rows_worst = max(layouts.rows_worst, to_float32)


def figures_of(layouts: Layouts, compiled: int, compiling: float) -> dict:
    seen, first, again = set(), [], []
    for length, seconds, _ in layouts.rows:
        (again if length in seen else first).append(seconds)
        seen.add(length)
    return {
        "layouts": len(layouts.rows),
        "distinct_lengths": len(seen),
        "compilations": compilations() - compiled,
        "compile_seconds_forward": compile_seconds() - compiling,
        "mean_seconds_new_length": sum(first) / len(first),
        "mean_seconds_known_length": sum(again) / len(again) if again else None,
        "worst_gap_nats": layouts.worst,
        "mean_gap_nats": sum(layouts.means) / len(layouts.means),
        "worst_gradient_gap": max(layouts.gradients),
        "mean_gradient_gap": sum(layouts.gradients) / len(layouts.gradients),
        "one_row_at_a_time_worst_gap_to_float32_nats": layouts.rows_worst,
        "by_layout": layouts.rows,
    }


def one_dtype(record: Record, sizes: Sizes, device: str, name: str) -> None:
    """All layouts, as many as there is time for."""
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    model = random_model(sizes.attention, device, dtype).train()
    exact = random_model(sizes.attention, device, dtype, attention="sdpa").float()
    rng, layouts, start = random.Random(0), Layouts(), time.monotonic()
    compiled, compiling = compilations(), compile_seconds()
    while len(layouts.rows) < sizes.layouts and time.monotonic() - start < sizes.attention_s:
        compare(model, exact, random_trees(rng, sizes), device, name == "autocast", layouts)
        record.add(**{name: figures_of(layouts, compiled, compiling)})
    figures, (worst, mean, gradient) = record.values[name], BOUNDS[name]
    record.claim(f"{name}: worst gap below {worst} nats", figures["worst_gap_nats"] < worst)
    record.claim(f"{name}: mean gap below {mean} nats", figures["mean_gap_nats"] < mean)
    record.claim(f"{name}: gradient gap below {gradient}", figures["worst_gradient_gap"] < gradient)
    if name == "autocast":
        record.add(alternating=alternating(model, sizes, device))


def alternating(model, sizes: Sizes, device: str) -> dict:
    """Compilations once a policy in training and a frozen model take turns, on a layout that was seen before."""
    trees, before = random_trees(random.Random(0), sizes), compilations()

    def turns() -> None:
        for _ in range(3):
            model.eval()
            with torch.no_grad():
                packed(model, trees, autocast(device))
            model.train()
            gradients(model, packed(model, trees, autocast(device)))

    seconds = seconds_of(device, turns)
    return {"turns": 3, "seconds": seconds, "compilations": compilations() - before}


def run(record: Record, sizes: Sizes, device: str) -> None:
    hits = LimitHits()
    logging.getLogger("torch._dynamo").addHandler(hits)
    record.add(recompile_limit=dynamo_config.recompile_limit)
    forget_peak(device)
    for name in BOUNDS if device == "cpu" else reversed(BOUNDS):  # on a GPU as training computes first
        one_dtype(record, sizes, device, name)
        record.add(limit_hits=hits.count, peak_gib=peak_gib(device))
