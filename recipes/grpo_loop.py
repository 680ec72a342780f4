"""GRPO (arXiv 2402.03300) through a server, with an exact-answer reward.

    python recipes/grpo_loop.py base_url=http://127.0.0.1:8000 [steps=20] [questions=8] [samples=8] [learning_rate=5e-4]

The key is that of RLT_API_KEY. Sums of two numbers; the answer is what stands before the turn ends, and its reward is
rlt.rewards.exact's. Held-out sums are answered before and after, and the difference has a 95 % interval.
G samples of each question, C completions of a step.
"""

import random
import time
from collections.abc import Sequence

import numpy as np
from common import EMBEDDED, LIMIT_S, arguments, connect, run, say, shifted

from rlt.rewards.exact import exact_answer
from rlt.serving import FutureGroup, SamplingClient
from rlt.serving.client import datum
from rlt.wire.values import AdamParams, Datum, SampledSequence, SamplingParams

STD_FLOOR = 1e-4  # keeps a group whose rewards agree from exploding
SHOWN = [{"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}]


class Questions:
    """Sums up to `largest`, as tokens, with their solutions."""

    def __init__(self, client, model: str, largest: int, seed: int) -> None:
        self.client, self.model, self.largest, self.chance = client, model, largest, random.Random(seed)

    def draw(self, count: int) -> list[tuple[list[int], str]]:
        pairs = [(self.chance.randint(0, self.largest), self.chance.randint(0, self.largest)) for _ in range(count)]
        asked = [[*SHOWN, {"role": "user", "content": f"What is {a} + {b}?"}] for a, b in pairs]
        prompts = [self.client.apply_chat_template(self.model, each) for each in asked]
        return [(prompt, str(a + b)) for prompt, (a, b) in zip(prompts, pairs, strict=True)]


def answers_of(sampler: SamplingClient, questions, samples: int, seed: int) -> list[list[SampledSequence]]:
    """G answers to each question; all are on their way at once."""
    params = [SamplingParams(max_tokens=6, seed=seed + number) for number in range(len(questions))]
    asked = [sampler.sample(prompt, each, samples) for (prompt, _), each in zip(questions, params, strict=True)]
    return [each.sequences for each in FutureGroup(asked).wait_all(LIMIT_S)]


def rewards_of(client, model: str, questions, groups: list[list[SampledSequence]]) -> np.ndarray:
    """(questions, G)."""
    texts = client.detokenize(model, [each.tokens for group in groups for each in group])
    solutions = [solution for (_, solution), group in zip(questions, groups, strict=True) for _ in group]
    return np.array(exact_answer(texts, solutions)).reshape(len(groups), -1)


def data_of(questions, groups: list[list[SampledSequence]], rewards_QG: np.ndarray) -> list[Datum]:
    """How much better each answer was than its siblings, on each of its tokens; 1 over all tokens as weight."""
    spread_Q1 = rewards_QG.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR
    advantages_QG = (rewards_QG - rewards_QG.mean(axis=1, keepdims=True)) / spread_Q1
    weight = 1 / sum(each.tokens.size for group in groups for each in group)
    data = []
    for (prompt, _), group, row in zip(questions, groups, advantages_QG, strict=True):
        for each, advantage in zip(group, row, strict=True):
            tokens, inputs = shifted(
                prompt, each.tokens.tolist(), logprobs=each.logprobs, advantages=float(advantage), weights=weight
            )
            data.append(datum(tokens, **inputs))
    return data


def interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """95 % of the mean paired difference over questions, by bootstrap."""
    difference = after.mean(axis=1) - before.mean(axis=1)
    drawn = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main(words: Sequence[str]) -> dict[str, float]:
    given = arguments(
        words,
        base_url="http://127.0.0.1:8000",
        model=EMBEDDED,
        steps=20,
        questions=8,
        samples=8,
        learning_rate=5e-4,
        rank=16,
        largest=20,
        held_out=32,
        seed=0,
    )
    with connect(given.base_url) as client:
        model = client.create_model(given.model, rank=given.rank, seed=given.seed)
        held_out = Questions(client, given.model, given.largest, given.seed + 1).draw(given.held_out)
        drawn = Questions(client, given.model, given.largest, given.seed)

        def measure() -> np.ndarray:
            groups = answers_of(model.save_for_sampling(), held_out, given.samples, 10**6)
            return rewards_of(client, given.model, held_out, groups)

        before, began = measure(), time.monotonic()
        for step in range(1, given.steps + 1):
            questions = drawn.draw(given.questions)
            groups = answers_of(model.save_for_sampling(), questions, given.samples, 1000 * step)
            rewards_QG = rewards_of(client, given.model, questions, groups)
            data = data_of(questions, groups, rewards_QG)
            metrics = model.train_batch(data, "grpo", AdamParams(given.learning_rate))
            say(f"step {step} reward {rewards_QG.mean():.3f} loss {metrics['loss:sum']:.4f} "
                f"seconds {time.monotonic() - began:.0f}")  # fmt: skip
        after = measure()
    low, high = interval(before, after)
    say(f"held out {before.mean():.3f} -> {after.mean():.3f}, 95 % interval of the difference [{low:.3f}, {high:.3f}]")
    return {"before": float(before.mean()), "after": float(after.mean()), "low": low, "high": high}


if __name__ == "__main__":
    run(main)
