"""Right answers of the student and the gate: by hand, and with a real model that writes and real checks."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import EMBEDDED, build, config_of
from safetensors.torch import load_file
from test_reductions import PAPER

from rlt.errors import Refused
from rlt.generation.answering import write_answers
from rlt.generation.decoding import Stops, decode, decode_many
from rlt.models.loading import load_frozen, load_tokenizer
from rlt.planning.plan import make_plan
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.rewards.gate import gate_penalty, last_boxed, own_result
from rlt.rewards.generated import answer_in, answer_prompt, drawn_share, kept_tokens
from rlt.rewards.terms import AddedTerms
from rlt.schema import GeneratedRewardConfig, ResultGateConfig, RewardOptions
from rlt.wire.values import SamplingParams
from trainers.grpo import GRPOTrainer

STYLE = load_format("stratos")
END = STYLE.explanation_tags[1]
ROW = {"question": "What is 3 * 4?", "solution": "12"}
TEXTS = [f"Three fours are 12.{END}", f"It is 11, I think.{END}", f"Words alone.{END}", "It is 12, without an end."]
CHECK = {"verifier": "auto", "verifier_limit_s": 1.5}
GATE = ResultGateConfig(**CHECK, wrong_result_penalty=-2.0, missing_result="wrong")
ANSWERS = GeneratedRewardConfig(
    **CHECK,
    answers_per_explanation=4,
    answers_weight=3.0,
    answers_cut=0.5,
    answers_temperature=0.7,
    answers_max_length=8,
)


def options_of(generated=None, gate=None) -> RewardOptions:
    return RewardOptions(permute_rewards=False, report_rsr=False, generated=generated, gate=gate)


@pytest.fixture
def scored(tokenizer):
    """Readings and scores of the texts, with a log-prob of -1 for every token of the student and -2 of the teacher."""

    def constant(value):
        return lambda sequences, counted, temperature: [torch.full((len(where),), value) for where in counted]

    reward = TeacherReward(tokenizer, STYLE, PAPER, 0.7, constant(-2.0), constant(-1.0))
    readings = reward.read([ROW] * len(TEXTS), TEXTS)
    return readings, reward.score_readings(readings)


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}, that is half", "1/2", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{ 4 }", "4", "4"),
        ("12 apples.\nAnswer: 7\nas in step 3", "7", "7"),
        ("first 3, then 4, at last 1,250.5 in all.", "1250.5", "1,250.5"),
        ("it falls to -3.", "-3", "-3"),
        ("no number at all", "4", None),
        ("there were 12 of them", "blue", None),  # a number is no result where the solution is a word
        (r"\boxed{never closed", "blue", None),
    ],
)
def test_an_explanations_own_result(text, solution, expected):
    assert own_result(text, STYLE, solution) == expected


def test_a_box_may_hold_braces():
    assert last_boxed(r"\boxed{a{b}c} d") == "a{b}c" and last_boxed(r"\boxed{}") is None


def test_the_gate_adds_its_penalty_and_a_key_decides_where_no_result_is_found():
    assert [gate_penalty(right, GATE) for right in (True, False, None)] == [0.0, -2.0, -2.0]
    assert gate_penalty(None, replace(GATE, missing_result="right")) == 0.0


def test_wrong_results_lose_what_the_gate_takes_and_nothing_else_changes(tokenizer, scored):
    readings, before = scored
    terms = AddedTerms(options_of(gate=GATE), STYLE, tokenizer, never)
    after = terms([ROW] * 4, TEXTS, readings, before, [0] * 4)
    assert [a.reward - b.reward for a, b in zip(after, before, strict=True)] == [0.0, -2.0, -2.0, 0.0]
    assert [one.parts["result_right"] for one in after] == [1, 0, 0, 1]
    assert [one.parts["result_found"] for one in after] == [1, 1, 0, 1]
    assert all(a.solution_log_prob_reward == b.solution_log_prob_reward for a, b in zip(after, before, strict=True))


def never(prompts, seeds):
    raise AssertionError("asked")


def test_a_share_keeps_at_least_one_token_and_never_all():
    assert [kept_tokens(share, 10) for share in (0.01, 0.25, 0.5, 0.74, 0.99)] == [1, 2, 5, 7, 9]
    assert kept_tokens(0.5, 1) == 1 and kept_tokens(0.9, 2) == 1
    shares = [drawn_share(seed) for seed in range(400)]
    assert all(0 < share < 1 for share in shares) and shares[0] == drawn_share(0)
    assert sum(shares) / 400 == pytest.approx(0.5, abs=0.05)


def test_the_student_reads_the_beginning_of_the_explanation_as_its_whole_thought(tokenizer, scored):
    reading = scored[0][0]
    prompt = tokenizer.decode(answer_prompt(tokenizer, STYLE, reading, 5))
    head = tokenizer.decode(reading.student.ids[: reading.student.spans["thought"][0]])
    thought = tokenizer.decode([reading.student.ids[i] for i in reading.explanation.right[:5]])
    assert prompt == f"{head}{thought}{STYLE.thought_tags[1]}{STYLE.delimiter}{STYLE.solution_tags[0]}"
    assert "Three" in thought and "12." not in thought


def test_an_answer_ends_with_its_tag_and_a_sentence_gives_its_result():
    assert answer_in(f" 12 {STYLE.solution_tags[1]} not 13", STYLE, "12") == "12"
    assert answer_in("So the answer is 12.", STYLE, "12") == "12"
    assert answer_in("x + 1", STYLE, "1 + x") == "x + 1" and answer_in("  ", STYLE, "12") is None


def test_a_student_that_is_to_answer_has_tags_that_are_read(tiny_student):
    own = load_tokenizer(tiny_student)
    own.add_special_tokens({"additional_special_tokens": [STYLE.solution_tags[1]]})
    with pytest.raises(Refused, match="is a special token of this tokenizer"):
        AddedTerms(options_of(ANSWERS), STYLE, own, never)
    AddedTerms(options_of(gate=GATE), STYLE, own, never)  # which asks it nothing


def test_the_reward_grows_by_the_weighted_share_of_right_answers(tokenizer, scored):
    readings, before = scored
    asked = []

    def write(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        texts = [[" 12", "12.0", "13", "x"], ["12"] * 4, [""] * 4][: len(prompts)]
        return [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in some] for some in texts]

    after = AddedTerms(options_of(ANSWERS), STYLE, tokenizer, write)([ROW] * 4, TEXTS, readings, before, [5, 6, 7, 8])
    assert [one.parts["answers_right"] for one in after] == [0.5, 1.0, 0.0, 0.0]
    assert [a.reward - b.reward for a, b in zip(after, before, strict=True)] == pytest.approx([1.5, 3.0, 0.0, 0.0])
    assert len(asked) == 3  # not after the text without its end tag
    assert len({seed for _, seeds in asked for seed in seeds}) > 4 and asked[0][1] == [6, 7, 8, 9]
    assert asked[0][0] == answer_prompt(tokenizer, STYLE, readings[0], kept_tokens(0.5, len(readings[0].explanation)))


@pytest.mark.parametrize("attention", ["shared_prefix", "sdpa"])
def test_completions_of_padded_batches_are_those_of_each_prompt_alone(tiny_student, tokenizer, attention):
    model = load_frozen(tiny_student, torch.float64, attn_implementation=attention)
    prompts = [tokenizer(text)["input_ids"] for text in ("One", "Two and three are five", "Four", "A " * 30)]
    params = SamplingParams(temperature=1.5)
    stops = Stops(" a", [tokenizer.eos_token_id], tokenizer)

    def drawn_by(first):
        return [torch.Generator().manual_seed(first + number) for number in range(3)]

    alone = [decode(model, p, drawn_by(10 * n), params, stops, 12) for n, p in enumerate(prompts)]
    for budget in (10_000, 120):
        own = [drawn_by(10 * n) for n in range(4)]
        assert decode_many(model, prompts, own, params, stops, 12, budget) == alone


def test_answers_stop_at_their_end_tag_and_at_the_models_own_end(tiny_student, tokenizer):
    model = load_frozen(tiny_student, torch.float32)
    model.train()
    prompts, seeds = [tokenizer("One")["input_ids"]] * 2, [[1, 2], [1, 3]]
    first, second = write_answers(model, tokenizer, STYLE, ANSWERS, prompts, seeds, None)
    assert model.training and len(first) == 2 and all(1 <= len(ids) <= 8 for ids in first + second)
    assert first[0] == second[0] and first[1] != second[1]
    assert write_answers(model, tokenizer, STYLE, ANSWERS, [], [], None) == []


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A run on sums whose explanations are made up: six of eight have the end tag."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", explain)
    rows = [{"question": f"What is {n} + 1?", "solution": str(n + 1)} for n in range(1, 9)]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = [f"dataset_id_or_path={tmp_path / 'sums.jsonl'}", "eval_size=0", "eval_steps=null", "dataset_size=8"]
    return [*data, "save_steps=1", "save_total_limit=null"]


def explain(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
    """One more than the sum's first number, in words that differ between siblings; the first two lack the end tag."""
    texts = [self.processing_class.decode(ids) for ids in prompt_ids]
    sums = [int(text.rpartition("What is ")[2].split()[0]) + 1 for text in texts]
    ends = ["", "", *[END] * (len(sums) - 2)]
    written = [f"{'count on, ' * (i % 4)}so it is {n}.{end}" for i, (n, end) in enumerate(zip(sums, ends, strict=True))]
    return [self.processing_class.encode(text, add_special_tokens=False) for text in written], None


SHORT = ["answers_per_explanation=2", "answers_max_length=12", "answers_weight=5"]
KINDS = {
    "random and generated": ["reward_cfg=[random,generated]", *SHORT, "verifier=exact"],
    "generated, by a student that can add": ["reward_cfg=generated", *SHORT, f"student_model={EMBEDDED}"],
}


@pytest.mark.parametrize("kind", ["random and generated", pytest.param(list(KINDS)[1], marks=pytest.mark.slow)])
def test_a_run_that_goes_on_draws_what_the_unbroken_one_draws(tiny_run, tmp_path, sums, kind):
    run = [*sums, *KINDS[kind], "max_steps=2"]
    whole, _ = build(tiny_run, tmp_path / "whole", *run)
    whole.train()
    again, _ = build(tiny_run, tmp_path / "again", *run)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    a, b = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logged = [[r for r in trainer.state.log_history if "reward" in r] for trainer in (whole, again)]
    assert logged[0][-1]["reward"] == logged[1][-1]["reward"]
    assert {k: v for k, v in logged[0][-1].items() if "answers" in k} == {
        k: v for k, v in logged[1][-1].items() if "answers" in k
    }
    if kind.endswith("can add"):
        assert any(0 < record["reward_parts/answers_right"] < 0.75 for record in logged[0])


STUDENTS = {"the reference": [], "the policy without its adapter": ["use_peft=true", "lora_r=4"]}


@pytest.mark.parametrize("student", [pytest.param("the reference", marks=pytest.mark.slow), list(STUDENTS)[1]])
def test_a_student_that_is_the_reference_answers_too(tiny_run, tmp_path, sums, student):
    run = [
        *sums,
        *KINDS["random and generated"],
        "student_model=null",
        *STUDENTS[student],
        "gradient_checkpointing=true",
    ]
    trainer, _ = build(tiny_run, tmp_path / "run", *run, "max_steps=1", "report_rsr=true")
    trainer.train()
    logged = next(record for record in trainer.state.log_history if "reward" in record)
    assert 0 < logged["reward_parts/answers_cut"] < 1 and logged["reward_parts/rsr"] > 0
    assert trainer.model.training


@pytest.mark.parametrize("reward", [pytest.param("teacher", marks=pytest.mark.slow), "random"])
def test_advantages_are_of_the_permuted_rewards_and_parts_of_the_completions_own(tiny_run, tmp_path, sums, reward):
    import pandas

    trainer, _ = build(tiny_run, tmp_path / "run", *sums, f"reward_cfg={reward}", "max_steps=1")
    trainer.train()
    table = pandas.read_parquet(next((tmp_path / "run" / "completions").glob("*.parquet")))
    own = table["solution_log_prob_reward"] + table["kl_reward"] + table["match_reward"]
    given = table["reward"]
    assert sorted(own[:4]) == pytest.approx(sorted(given[:4]), abs=1e-4)
    assert sorted(own[4:]) == pytest.approx(sorted(given[4:]), abs=1e-4)
    assert ((own - given).abs() > 1e-3).any() == (reward == "random")
    best = [table["advantage"][group].argmax() for group in (slice(4), slice(4, 8))]
    assert best == [given[group].argmax() for group in (slice(4), slice(4, 8))]


def test_a_sharded_reference_cannot_answer(monkeypatch):
    config = config_of("teacher_rlt", "reward_cfg=generated", "student_model=null", "dry_run=true")
    with pytest.raises(Refused, match="reward_cfg=generated with zero3: the student is the reference model"):
        make_plan(config, 8, sharding="zero3")


def test_the_terms_stand_beside_each_completion_that_is_written_down(tiny_run, tmp_path):
    import pandas

    short = ["max_steps=1", "eval_size=0", "eval_steps=null", "save_completions_probability=1"]
    trainer, _ = build(tiny_run, tmp_path, "reward_cfg=[gated,generated]", "answers_max_length=4", *short)
    trainer.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = pandas.read_parquet(file)
    assert {"answers_right", "answers_cut", "gate", "result_found", "result_right"} <= set(table.columns)
    assert table["answers_cut"].nunique() == len(table)
    logged = next(record for record in trainer.state.log_history if "reward" in record)
    assert json.dumps(logged["reward_parts/answers_right"]) and logged["reward_parts/gate"] <= 0
