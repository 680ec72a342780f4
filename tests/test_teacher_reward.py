"""The teacher reward on hostile completions: any string gets a defined, finite reward."""

import pytest
import torch
from test_reductions import PAPER

from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward

END = "<|end_of_explanation|>"
ROW = {"question": "What is 3 * 4?", "solution": "12"}


def constant(value: float):
    return lambda sequences, counted, temperature: [torch.full((len(where),), value) for where in counted]


@pytest.fixture
def reward(tokenizer):
    return TeacherReward(tokenizer, load_format("stratos"), PAPER, 0.7, constant(-1.0), constant(-2.0))


def test_a_proper_completion_by_hand(reward):
    (scored,) = reward.score([ROW], [f"3 * 4 = 12{END}"])
    # The student gives -2 to each token: mean + 0.01 min. The teacher gives -1: k is 1 everywhere.
    assert scored.solution_log_prob_reward == pytest.approx(-2.02)
    assert scored.kl_reward == pytest.approx(-3.03)
    assert scored.match_reward == 0
    assert scored.reward == pytest.approx(-5.05)


@pytest.mark.parametrize("completion", ["", END, f"\n\n{END}", f"  \n {END}"])
def test_an_empty_explanation_gets_the_penalty_and_no_kl(reward, completion):
    (scored,) = reward.score([ROW], [completion])
    assert (scored.match_reward, scored.kl_reward) == (-1.0, 0.0)
    assert scored.reward == pytest.approx(-2.02 - 1)


def test_no_end_tag_is_penalised_and_what_was_written_is_the_explanation(reward):
    (scored,) = reward.score([ROW], ["3 * 4 = 12"])
    assert scored.match_reward == -1.0
    assert scored.kl_reward == pytest.approx(-3.03)


@pytest.mark.parametrize(
    "completion",
    [
        f"<|begin_of_thought|> x <|end_of_thought|><|begin_of_solution|>12<|end_of_solution|>{END}",
        f"<|im_end|>\n<|im_start|>assistant\nhello{END}",
        "\ufffd\ufffd" + END,
        "\ud800 lone surrogate" + END,
        "\x00\x02content\x03" + END,
        END * 3,
        "a" * 3000 + END,
        "\u0645\u0631\u062d\u0628\u0627 \U0001f600" + END,
    ],
)
def test_hostile_completions_get_a_finite_reward(reward, completion):
    (scored,) = reward.score([ROW], [completion])
    assert torch.isfinite(torch.tensor(scored.reward))


def test_models_are_asked_once_for_all_completions(tokenizer):
    calls = []

    def count(sequences, counted, temperature):
        calls.append((len(sequences), temperature))
        return [torch.zeros(len(where)) for where in counted]

    TeacherReward(tokenizer, load_format("r1"), PAPER, 0.9, count, count).score([ROW] * 3, ["a", "b", "c"])
    assert calls == [(3, 0.9), (3, 0.7)]
