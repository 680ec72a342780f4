"""Supervised fine-tuning of an adapter, in this process or through a server: the loop is the same, and its losses.

    python recipes/sft_loop.py [steps=10] [batch_size=4] [learning_rate=1e-3] [data=rows.jsonl] [folder=results/sft]
    python recipes/sft_loop.py base_url=http://127.0.0.1:8000 [save=sft]         # key from RLT_API_KEY

Rows have a question and a solution; without `data` they are sums. Two minutes on two CPU cores.
"""

import time
from collections.abc import Callable, Sequence

import torch
from common import EMBEDDED, LIMIT_S, arguments, connect, rows_of, run, say, shifted

from rlt.models.loading import load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.serving.client import datum
from rlt.wire.values import AdamParams

Pair = tuple[list[int], dict[str, list]]  # tokens, and inputs of the loss
Step = Callable[[list[Pair]], float]  # a batch to its loss, and the weights after it


def batches_of(tokenizer, rows: list[dict], size: int, steps: int) -> list[list[Pair]]:
    """Weights are 1 over a batch's answer tokens, so that its loss is a mean."""
    batches = []
    for step in range(steps):
        chosen = [rows[(step * size + place) % len(rows)] for place in range(size)]
        asked = [[{"role": "user", "content": row["question"]}] for row in chosen]
        prompts = [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in asked]
        answers = [tokenizer(row["solution"] + tokenizer.eos_token).input_ids for row in chosen]
        weight = 1 / sum(map(len, answers))
        batches.append([shifted(p, a, weights=weight) for p, a in zip(prompts, answers, strict=True)])
    return batches


def local_step(model: str, folder: str, rank: int, seed: int, learning_rate: float) -> tuple[Step, Callable]:
    from backends import AdamParams, AdapterSpec, Datum, SharedBase, load_hf_model  # a client does without

    base = SharedBase(load_hf_model(model), folder)
    backend = base.create("sft", AdapterSpec(rank=rank, seed=seed)).result(LIMIT_S)

    def step(batch: list[Pair]) -> float:
        data = [Datum(ids, {name: torch.tensor(row) for name, row in inputs.items()}) for ids, inputs in batch]
        read = backend.forward_backward(data, "cross_entropy")
        backend.optim_step(AdamParams(learning_rate)).result(LIMIT_S)
        return read.result(LIMIT_S).metrics["loss:sum"]

    def save(name: str) -> str:
        return str(backend.save_state(name, overwrite=True).result(LIMIT_S))

    return step, save


def remote_step(client, model: str, rank: int, seed: int, learning_rate: float) -> tuple[Step, Callable]:
    training = client.create_model(model, rank=rank, seed=seed)

    def step(batch: list[Pair]) -> float:
        data = [datum(ids, **inputs) for ids, inputs in batch]
        return training.train_batch(data, "cross_entropy", AdamParams(learning_rate))["loss:sum"]

    def save(name: str) -> str:
        return training.save_state(name, overwrite=True).result(LIMIT_S)["path"]

    return step, save


def main(words: Sequence[str]) -> list[float]:
    """Its losses."""
    given = arguments(
        words,
        base_url=None,
        model=EMBEDDED,
        data=None,
        folder="results/sft_loop",
        save="sft",
        steps=10,
        batch_size=4,
        learning_rate=1e-3,
        rank=16,
        seed=0,
    )
    tokenizer = load_tokenizer(resolve_model_path(given.model))
    batches = batches_of(tokenizer, rows_of(given.data, 64), given.batch_size, given.steps)
    common = given.rank, given.seed, given.learning_rate
    if given.base_url is None:
        step, save = local_step(given.model, given.folder, *common)
    else:
        step, save = remote_step(connect(given.base_url), given.model, *common)
    losses, began = [], time.monotonic()
    for number, batch in enumerate(batches, start=1):
        losses.append(step(batch))
        say(f"step {number} loss {losses[-1]:.4f} seconds {time.monotonic() - began:.0f}")
    say(f"saved {save(given.save)}")
    return losses


if __name__ == "__main__":
    run(main)
