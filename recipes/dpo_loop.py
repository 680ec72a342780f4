"""DPO (arXiv 2305.18290) through a server by a loss of one's own: the server knows nothing of it.

    python recipes/dpo_loop.py base_url=http://127.0.0.1:8000 [steps=6] [pairs=4] [beta=0.1] [learning_rate=1e-3]

The key is that of RLT_API_KEY. Any loss of log-probs works so: read them, compute the loss and its gradients for them
here, and send these back as weights of the cross entropy, whose gradients they turn into those of the loss.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import EMBEDDED, LIMIT_S, arguments, connect, run, say, shifted
from torch.nn.functional import logsigmoid

from rlt.serving import TrainingClient
from rlt.serving.client import datum
from rlt.wire.values import AdamParams

Row = tuple[list[int], dict[str, list]]  # tokens, and inputs of the loss


def log_probs_of(model: TrainingClient, rows: list[Row]) -> list[torch.Tensor]:
    """Of each row's targets, with the weights as they are."""
    data = [datum(ids, target_tokens=inputs["target_tokens"]) for ids, inputs in rows]
    outputs = model.forward(data, "cross_entropy").result(LIMIT_S).outputs
    return [torch.from_numpy(each["logprobs"].copy()) for each in outputs]


def custom_step(model: TrainingClient, rows: list[Row], loss_fn: Callable, params: AdamParams) -> float:
    """One optimizer step on a function of the rows' log-probs; its loss."""
    log_probs = [values.requires_grad_() for values in log_probs_of(model, rows)]
    loss = loss_fn(log_probs)
    gradients = torch.autograd.grad(loss, log_probs)
    weighted = [
        datum(ids, target_tokens=inputs["target_tokens"], weights=(-gradient).tolist())
        for (ids, inputs), gradient in zip(rows, gradients, strict=True)
    ]
    model.train_batch(weighted, "cross_entropy", params)
    return loss.item()


def dpo(log_probs: list[torch.Tensor], reference: list[torch.Tensor], rows: list[Row], beta: float) -> torch.Tensor:
    """The mean of -log sigmoid(beta (gain of the chosen - gain of the rejected)); rows come in pairs."""
    masks = [torch.tensor(inputs["weights"]) for _, inputs in rows]
    gains = [(m * (p - r)).sum() for p, r, m in zip(log_probs, reference, masks, strict=True)]
    return -logsigmoid(beta * (torch.stack(gains[0::2]) - torch.stack(gains[1::2]))).mean()


def pairs_of(client, model: str, count: int) -> list[Row]:
    """Right sums are preferred to wrong ones."""
    rows = []
    for number in range(count):
        a, b = number * 7 % 40, number * 11 % 60
        prompt = client.apply_chat_template(model, [{"role": "user", "content": f"What is {a} + {b}?"}])
        answers = client.tokenize(model, [f"{a} + {b} = {a + b}<|im_end|>", f"{a} + {b} = {a + b + 3}<|im_end|>"])
        rows += [shifted(prompt, answer, weights=1.0) for answer in answers]
    return rows


def main(words: Sequence[str]) -> list[float]:
    """Its losses: log 2 at first, as the policy is its own reference."""
    given = arguments(
        words,
        base_url="http://127.0.0.1:8000",
        model=EMBEDDED,
        steps=6,
        pairs=4,
        beta=0.1,
        learning_rate=1e-3,
        rank=16,
        seed=0,
    )
    losses, began = [], time.monotonic()
    with connect(given.base_url) as client:
        model = client.create_model(given.model, rank=given.rank, seed=given.seed)
        base = client.create_model(given.model, rank=1)  # never trained: the reference
        rows, params = pairs_of(client, given.model, given.pairs), AdamParams(given.learning_rate)
        loss = partial(dpo, reference=log_probs_of(base, rows), rows=rows, beta=given.beta)
        for step in range(1, given.steps + 1):
            losses.append(custom_step(model, rows, loss, params))
            say(f"step {step} loss {losses[-1]:.4f} seconds {time.monotonic() - began:.0f}")
    return losses


if __name__ == "__main__":
    run(main)
