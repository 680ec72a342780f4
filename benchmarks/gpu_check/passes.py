"""Log-prob passes over random tokens: ours, and rows padded as stock TRL 1.16 has them, with its fused head."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from trl.trainer.utils import add_fused_lm_head

from benchmarks.gpu_check.measures import (
    autocast,
    compilations,
    forget_peak,
    matrix_rate,
    now,
    peak_gib,
    seconds_of,
)
from benchmarks.gpu_check.random_models import random_model
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import PassLayout, Shape, Sizes
from rlt.logprobs import token_log_probs

TEMPERATURE = 0.7
FIRST_TOKEN = 300  # behind special tokens and bytes
REPEATS = 2  # behind one that compiles


@dataclass(frozen=True)
class Batch:
    """Token ids of each completion with its prompt, and the indices that count."""

    sequences: list[list[int]]
    counted: list[list[int]]


def batch_of(layout: PassLayout, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, vocabulary, (count,), generator=generator).tolist()

    prompt = tokens(layout.prompt)
    sequences = [prompt + tokens(layout.completion) for _ in range(layout.completions)]
    return Batch(sequences, [list(range(layout.prompt, len(ids))) for ids in sequences])


def raw_tokens(layout: PassLayout) -> int:
    return layout.completions * (layout.prompt + layout.completion)


def distinct_tokens(layout: PassLayout) -> int:
    return layout.prompt + layout.completions * layout.completion


def forward_flops(layout: PassLayout, shape: Shape) -> float:
    """The fewest: each distinct token once, the head where tokens count; attention is 4 x width per token seen."""
    width = shape.heads * shape.head_size
    attention = 2 * shape.hidden * (width + shape.key_heads * shape.head_size)  # queries and output, keys and values
    per_token = 2 * shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    p, n, c = layout.prompt, layout.completions, layout.completion
    pairs = p**2 / 2 + n * c * (p + c / 2)
    head = 2 * shape.hidden * shape.vocabulary * n * c
    return distinct_tokens(layout) * per_token + pairs * 4 * width * shape.layers + head


def ours(model, batch: Batch, device: str) -> torch.Tensor:
    values, _ = token_log_probs(
        model,
        batch.sequences,
        batch.counted,
        temperature=TEMPERATURE,
        token_budget=2**30,
        autocast=autocast(device),
        entropy="value" if torch.is_grad_enabled() else "none",
    )
    return torch.cat(values)


def padded(model, batch: Batch, device: str) -> torch.Tensor:
    """All rows have one length here, so that none is padded in the end."""
    ids = torch.tensor(batch.sequences, device=device)
    labels = torch.full_like(ids, -100)
    for row, where in enumerate(batch.counted):
        labels[row, where[0] :] = ids[row, where[0] :]
    with autocast(device):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    return outputs.log_probs[labels[:, 1:] != -100]


def model_of(variant: str, shape: Shape, device: str, trained: bool):
    """float32 weights that are trained, under gradient checkpointing; frozen ones in bfloat16."""
    attention = {"attention": "sdpa"} if variant == "stock" else {}
    model = random_model(shape, device, torch.float32 if trained else torch.bfloat16, **attention)
    if trained:
        model.train()
        model.gradient_checkpointing_enable()
    else:
        model.requires_grad_(False)
    if variant == "stock":
        # As in stock: entropies of the policy are logged, those of frozen models are not computed.
        add_fused_lm_head(
            model, temperature=TEMPERATURE, outputs=("log_probs", "entropy") if trained else ("log_probs",)
        )
    return model


def one_pass(compute: Callable, model, batch: Batch, device: str, trained: bool) -> float:
    """The mean log-prob; gradients are made and dropped."""
    with torch.set_grad_enabled(trained):
        mean = compute(model, batch, device).mean()
    if trained:
        mean.backward()
        model.zero_grad()
    return mean.item()


def measure(
    compute: Callable, model, layout: PassLayout, shape: Shape, device: str, trained: bool, rate: float, note: Callable
) -> dict[str, float]:
    """Seconds, tokens per second, share of the matrix rate, memory.

    Args:
        note: is told the first pass's seconds at once: where the part is ended before the others, they say why.
    """
    batch, compiled = batch_of(layout, shape.vocabulary), compilations()
    forget_peak(device)
    start = now(device)
    mean = one_pass(compute, model, batch, device, trained)
    first = now(device) - start
    note(first_seconds=first, compilations=compilations() - compiled)
    seconds = median(
        [seconds_of(device, lambda: one_pass(compute, model, batch, device, trained)) for _ in range(REPEATS)]
    )
    flops = forward_flops(layout, shape) * (3 if trained else 1)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "compilations": compilations() - compiled,
        "raw_tokens_per_second": raw_tokens(layout) / seconds,
        "distinct_tokens_per_second": distinct_tokens(layout) / seconds,
        "share_of_matrix_rate": flops / seconds / rate,
        "peak_gib": peak_gib(device),
        "mean_log_prob": mean,
    }


def measure_all(record: Record, sizes: Sizes, shapes: dict[str, Shape], device: str, trained: bool) -> None:
    """Every shape and layout, the smallest first, as the part may be ended: ours, then stock TRL's."""
    rate = matrix_rate(device, sizes.matrix)
    record.add(matrix_tflops=rate / 1e12)
    for name, shape in shapes.items():
        for variant, compute in (("ours", ours), ("stock", padded)):
            start = now(device)
            model = model_of(variant, shape, device, trained)
            record.add(**{f"{name}_{variant}_made_in_s": now(device) - start})
            for layout in sorted(sizes.passes, key=raw_tokens):

                def note(key=f"{name}_{layout.name}", variant=variant, **figures) -> None:
                    record.add(**{key: {**record.values.get(key, {}), variant: figures}})

                try:
                    note(**measure(compute, model, layout, shape, device, trained, rate, note))
                except torch.cuda.OutOfMemoryError as error:
                    note(out_of_memory=str(error).partition("\n")[0])
                    model.zero_grad()
            del model
            forget_peak(device)
    judge(record, sizes, shapes)


def judge(record: Record, sizes: Sizes, shapes: dict[str, Shape]) -> None:
    """Ours ran everywhere, and says of random tokens what stock says."""
    for name in shapes:
        for layout in sizes.passes:
            key = f"{name}_{layout.name}"
            both = record.values[key]
            record.claim(f"{key}: ours fits", "seconds" in both["ours"])
            if "seconds" in both["ours"] and "seconds" in both["stock"]:
                ratio = both["stock"]["seconds"] / both["ours"]["seconds"]
                record.add(**{key: {**both, "stock_seconds_by_ours": ratio}})
                gap = abs(both["ours"]["mean_log_prob"] - both["stock"]["mean_log_prob"])
                record.claim(f"{key}: mean log-probs agree to 0.02 nats", gap < 0.02)
