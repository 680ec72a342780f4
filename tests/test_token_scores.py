"""What a page shows of a completion, token by token, against the reward that was made of it."""

import json

import pytest
from test_teacher_reward import reward  # noqa: F401  (a fixture)

from rlt.estimates import best_median_worst
from rlt.reports.completions import completion, token
from rlt.rewards.tokens import token_columns


def test_best_median_and_worst_are_of_the_finite():
    assert best_median_worst([1.0, float("nan"), 3.0, 2.0]) == [2, 3, 0]
    assert best_median_worst([1.0]) == [0]
    assert best_median_worst([float("nan")]) == []


def test_tokens_add_up_to_the_parts_of_the_reward(reward, tokenizer):  # noqa: F811
    row = {"question": "2 + 2?", "solution": "four"}
    texts = ["Two and two.<|end_of_explanation|>", "Two <b>and</b> two is four."]
    readings = reward.read([row] * 2, texts)
    scored = reward.score_readings(readings)
    for text, columns, one in zip(texts, token_columns(tokenizer, readings, scored), scored, strict=True):
        found = json.loads(columns)
        # Without the tokens that straddle a tag, such as the last full stop's.
        assert text.startswith("".join(piece for piece, *_ in found["explanation"]).strip())
        assert len(found["explanation"]) >= 4
        assert "".join(piece for piece, _ in found["solution"]) == "four"
        kl = [k for *_, k in found["explanation"]]
        assert one.parts["reasoning_kl_mean"] == pytest.approx(sum(kl) / len(kl), abs=1e-3)
        log_probs = [value for _, value in found["solution"]]
        assert one.parts["answer_log_prob_mean"] == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-3)


def test_a_page_escapes_what_a_model_wrote():
    scores = {"explanation": [["<script>", -1.0, 0.5]], "solution": [["4", -0.1]]}
    shown = completion({"completion": "<script>4", "reward": 1.0, "token_scores": json.dumps(scores)}, "best")
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_colours_grow_with_the_nats_up_to_their_limit():
    assert "rgba(200,60,40,0.00)" in token("a", 0.0, "", (200, 60, 40))
    assert "rgba(200,60,40,0.38)" in token("a", 4.0, "", (200, 60, 40))
    assert "rgba(200,60,40,0.75)" in token("a", 80.0, "", (200, 60, 40))
