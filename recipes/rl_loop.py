"""Reinforcement-Learned Teachers (arXiv 2506.08388) by a client alone: student and teacher are models of the server.

    RLT_API_KEY=tml-... python recipes/rl_loop.py base_url=http://127.0.0.1:8000 [steps=3] [questions=2] [samples=4]
        [student=embedded/smollm2-135m-instruct] [beta=0.04] [learning_rate=1e-4] [max_tokens=64] [data=rows.jsonl]

The teacher explains a question whose solution it is shown; the reward is how well the student, given the explanation as
its own thought, predicts the solution, minus how unnatural the explanation is to it (rlt/rewards/teacher.py). Both are
read by `forward`, at temperature 1. Its losses are those of trainers/teacher_grpo.py.
Q questions, G samples of each, C completions.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from common import EMBEDDED, LIMIT_S, arguments, connect, rows_of, run, say, shifted

from rlt.models.loading import load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.planning.configuration import compose_config
from rlt.prompts.rendering import prompt_token_ids, render_teacher_prompt
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.schema import TeacherRewardConfig, pick
from rlt.serving import FutureGroup, TrainingClient
from rlt.serving.client import datum
from rlt.wire.values import AdamParams, Datum, SamplingParams

STD_FLOOR = 1e-4
DEFAULTS = {"base_url": "http://127.0.0.1:8000", "model": EMBEDDED, "student": EMBEDDED, "data": None, "steps": 3}
DEFAULTS |= {"questions": 2, "samples": 4, "beta": 0.04, "learning_rate": 1e-4, "rank": 16, "max_tokens": 64, "seed": 0}


def log_probs_of(model: TrainingClient):
    """A function that reads with a model as it is: of each sequence the log-probs of the counted tokens."""

    def read(sequences: list[list[int]], counted: list[list[int]], temperature: float) -> list[torch.Tensor]:
        assert temperature == 1.0, temperature  # what `forward` reads at
        data = [datum(ids[:-1], target_tokens=ids[1:]) for ids in sequences]
        outputs = model.forward(data, "cross_entropy").result(LIMIT_S).outputs
        found = [torch.from_numpy(each["logprobs"].copy()) for each in outputs]
        return [values[torch.tensor(where, dtype=torch.long) - 1] for values, where in zip(found, counted, strict=True)]

    return read


def make_reward(tokenizer, teacher: TrainingClient, student: TrainingClient, style: str = "stratos") -> TeacherReward:
    config = replace(pick(compose_config(["run_cfg=teacher_rlt_tiny"])[0], TeacherRewardConfig),
                     unbias_student_log_probs_temp=1.0)  # fmt: skip
    return TeacherReward(tokenizer, load_format(style), config, 1.0, log_probs_of(teacher), log_probs_of(student))


def data_of(prompts: list, completions: list, rewards_C: torch.Tensor, samples: int, reference) -> list[Datum]:
    """A datum for each completion: advantages within groups of `samples`, 1 over all tokens as weight; `reference` is a
    model or None."""
    rewards_QG = rewards_C.view(-1, samples)
    spread_Q1 = rewards_QG.std(dim=1, keepdim=True) + STD_FLOOR
    advantages_C = ((rewards_QG - rewards_QG.mean(dim=1, keepdim=True)) / spread_Q1).flatten().tolist()
    weight = 1 / sum(map(len, completions))
    more = [{}] * len(completions)
    if reference is not None:
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        counted = [[*range(len(prompt), len(ids))] for prompt, ids in zip(prompts, whole, strict=True)]
        more = [{"ref_logprobs": values.tolist()} for values in log_probs_of(reference)(whole, counted, 1.0)]
    rows = zip(prompts, completions, advantages_C, more, strict=True)
    shaped = [shifted(p, c, advantages=a, weights=weight, **values) for p, c, a, values in rows]
    return [datum(tokens, **inputs) for tokens, inputs in shaped]


def sample(teacher: TrainingClient, prompts: list[list[int]], samples: int, most: int, seed: int) -> list[list[int]]:
    """`samples` completions of each prompt, neighbours in the list."""
    sampler = teacher.save_for_sampling()
    params = [SamplingParams(max_tokens=most, seed=seed + number) for number in range(len(prompts))]
    asked = [sampler.sample(ids, each, samples) for ids, each in zip(prompts, params, strict=True)]
    return [s.tokens.tolist() for each in FutureGroup(asked).wait_all(LIMIT_S) for s in each.sequences]


def main(words: Sequence[str]) -> list[float]:
    """Mean rewards of its steps."""
    given = arguments(words, **DEFAULTS)
    tokenizer = load_tokenizer(resolve_model_path(given.model))
    rows, means, began = rows_of(given.data, 64), [], time.monotonic()
    with connect(given.base_url) as client:
        teacher = client.create_model(given.model, rank=given.rank, seed=given.seed)
        student = client.create_model(given.student, rank=1)  # never trained: the model itself
        reference = client.create_model(given.model, rank=1) if given.beta else None
        reward = make_reward(tokenizer, teacher, student)
        for step in range(1, given.steps + 1):
            first = (step - 1) * given.questions
            asked = [rows[(first + number) % len(rows)] for number in range(given.questions)]
            texts = [render_teacher_prompt(tokenizer, reward.style, r["question"], r["solution"]) for r in asked]
            prompts = prompt_token_ids(tokenizer, texts)
            completions = sample(teacher, prompts, given.samples, given.max_tokens, 1000 * step + given.seed)
            scored = reward.score([row for row in asked for _ in range(given.samples)],
                                  tokenizer.batch_decode(completions, skip_special_tokens=True))  # fmt: skip
            rewards_C = torch.tensor([each.reward for each in scored])
            repeated = [ids for ids in prompts for _ in range(given.samples)]
            data = data_of(repeated, completions, rewards_C, given.samples, reference)
            metrics = teacher.train_batch(data, "grpo", AdamParams(given.learning_rate), {"beta": given.beta})
            means.append(rewards_C.mean().item())
            say(f"step {step} reward {means[-1]:.3f} loss {metrics['loss:sum']:.4f} "
                f"seconds {time.monotonic() - began:.0f}")  # fmt: skip
    return means


if __name__ == "__main__":
    run(main)
