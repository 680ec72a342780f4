"""The teacher reward against a reference implementation: 7 configurations, 35 completions, float32."""

import json
from pathlib import Path

import pytest
import torch
from test_reductions import PAPER

from rlt.logprobs import token_log_probs
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_frozen, load_tokenizer
from rlt.prompts.rendering import render_teacher_prompt
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.schema import TeacherRewardConfig

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "teacher_rewards.json").read_text())
NAMES = ("reward", "solution_log_prob_reward", "kl_reward", "match_reward")
SYSTEM, QUESTION_AT = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def models():
    """Tokenizer, student, and the teacher: the same weights with the last norm multiplied by 1.25."""
    path = str(embedded_model_path("embedded/smollm2-135m-instruct"))
    student, teacher = (load_frozen(path, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        teacher.model.norm.weight.mul_(1.25)
    return load_tokenizer(path), student, teacher


def log_probs_of(model):
    def ask(sequences, counted, temperature):
        with torch.no_grad():
            return token_log_probs(model, sequences, counted, temperature=temperature, token_budget=4096)[0]

    return ask


def teacher_system(case: dict) -> str:
    return case["teacher_prompt"].removeprefix(SYSTEM).partition(QUESTION_AT)[0]


@pytest.mark.parametrize("name", sorted(GOLDENS["configs"]))
def test_rewards_and_parts_equal_the_reference(models, name):
    tokenizer, student, teacher = models
    cases = [case for case in GOLDENS["cases"] if case["config"] == name]
    config = TeacherRewardConfig(**{**vars(PAPER), **GOLDENS["base_config"], **GOLDENS["configs"][name]})
    style = load_format("stratos")
    rows = [
        {
            "question": case["question"],
            "solution": case["solution"],
            "teacher_system_prompt": teacher_system(case),
            "student_system_prompt": case["student_system_prompt"],
        }
        for case in cases
    ]
    for row, case in zip(rows, cases, strict=True):
        rendered = render_teacher_prompt(
            tokenizer, style, row["question"], row["solution"], row["teacher_system_prompt"]
        )
        assert rendered == case["teacher_prompt"]
    reward = TeacherReward(
        tokenizer, style, config, GOLDENS["teacher_temperature"], log_probs_of(teacher), log_probs_of(student)
    )
    scored = reward.score(rows, [case["completion"] for case in cases])
    for case, ours in zip(cases, scored, strict=True):
        ours = ours.as_dict()
        for key in (key for key in case if key in NAMES or key.startswith(("answer_log_prob_", "reasoning_kl_"))):
            assert ours[key] == pytest.approx(case[key], abs=1e-4, rel=1e-4), (name, key, case["completion"][:40])
