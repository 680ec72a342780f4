"""Rewards of what was just sampled: the teacher is not read where its engine has said all that counts."""

from dataclasses import replace

import pytest
import torch
from test_reductions import PAPER

from rlt.models.loading import load_frozen
from rlt.prompts.rendering import prompt_token_ids, render_teacher_prompt
from rlt.prompts.styles import load_format
from rlt.survival.readings import lasting_log_probs
from rlt.traces.scoring import TraceScorer

TEXTS = ["Three fours are 12.<|end_of_explanation|>", "It is 12."]
ROW = {"question": "What is 3 * 4?", "solution": "12"}


@pytest.fixture
def sampled(tokenizer):
    """Two answers to one prompt: rows, prompts, tokens, and a log-prob of -0.5 for each token."""
    style = load_format("stratos")
    prompts = prompt_token_ids(tokenizer, [render_teacher_prompt(tokenizer, style, ROW["question"], ROW["solution"])])
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return [ROW] * 2, prompts * 2, tokens, [[-0.5] * len(ids) for ids in tokens]


def test_without_a_teacher_its_engines_numbers_are_enough(sampled, tokenizer, tiny_student):
    asked = []

    def behind(prompts, tokens):
        asked.extend(zip(prompts, tokens, strict=True))
        return [-0.25] * len(tokens)

    student = load_frozen(tiny_student, torch.float32)
    scorer = TraceScorer(tokenizer, load_format("stratos"), PAPER, None, student, behind, 0.7, lasting_log_probs(512))
    texts, scored = scorer.score(*sampled)
    assert texts == TEXTS
    prompt = sampled[1][0]
    first = len(prompt) - len(asked)  # the explanation's tokens in the prompt, each asked for once
    assert 0 < len(asked) < 5
    assert asked == [(prompt[:end], prompt[end]) for end in range(first, len(prompt))]
    for one in scored:
        teacher_T = one.log_probs[1].tolist()
        assert teacher_T == [-0.25] * len(asked) + [-0.5] * (len(teacher_T) - len(asked))
        assert len(teacher_T) > len(asked) + 3


def test_at_another_temperature_the_teacher_is_read_and_its_engine_not_asked(sampled, tokenizer, tiny_student):
    def behind(*_):
        raise AssertionError("asked")

    model = load_frozen(tiny_student, torch.float32)
    config = replace(PAPER, unbias_teacher_log_probs=False)
    scorer = TraceScorer(tokenizer, load_format("stratos"), config, model, model, behind, 0.7, lasting_log_probs(512))
    _, scored = scorer.score(*sampled)
    assert all((one.log_probs[1] != -0.5).all() for one in scored)
