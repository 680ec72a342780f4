"""A student with another tokenizer than its teacher: pieces of text by hand, rewards one text at a time, real runs."""

import json
from dataclasses import replace

import pandas
import pytest
import torch
from conftest import build, config_of, launch
from families import family
from test_reductions import PAPER
from test_teacher_reward import END, constant
from test_training import parameters_of
from transformers import LlamaConfig, LlamaForCausalLM

from rlt.jobs import run_plan
from rlt.logprobs import token_log_probs
from rlt.models.loading import load_frozen, load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.planning.plan import make_plan
from rlt.prompts.rendering import prompt_token_ids, render_student_reading, render_teacher_prompt
from rlt.prompts.spans import Aligned, common_pieces, tiled, tokenize_with_spans
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.rewards.teacher import Reading, piece_log_probs
from rlt.rewards.tokens import token_scores
from rlt.runs.folder import prepare_output
from rlt.survival.readings import lasting_log_probs
from rlt.traces.scoring import TraceScorer

STYLE = load_format("stratos")
ROW = {"question": "What is 3 * 4?", "solution": "12 apples"}
THOUGHTS = ["3 * 4 is 12", "Three fours are twelve, because 4 + 4 + 4 is 12", "Multiply the numbers of the question"]
SUMS = [f"{a} plus {b} is {a + b}, because the numbers are added" for a in range(20) for b in range(20)]


def save_model(folder, tokenizer, seed: int) -> str:
    """A tiny random model with this tokenizer."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape |= {"vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 2048, **ids}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A Qwen3 of 900 tokens that were learned from the README."""
    return save_model(tmp_path_factory.mktemp("teacher"), family("qwen3", size=900), seed=0)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    """A Gemma 3 of 420 tokens that were learned from sums."""
    return save_model(tmp_path_factory.mktemp("student"), family("gemma3", size=420, text=SUMS), seed=1)


# By hand


def test_pieces_end_where_both_sides_have_a_boundary():
    """`abcdefg` as ab|c|def|g and as a|bc|de|f|g: the first boundary in common is behind c, then come f and g."""
    left, right = [(0, 2), (2, 3), (3, 6), (6, 7)], [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7)]
    found = common_pieces(left, right)
    assert found == [(range(2), range(2)), (range(2, 3), range(2, 4)), (range(3, 4), range(4, 5))]


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ([(2, 4), (4, 6)], [(0, 2), (2, 4), (4, 6)], [(0, 1), (1, 2)]),  # its first token was dropped
        ([(0, 2), (2, 4)], [(0, 4), (4, 6)], [(0, 0)]),  # what one side alone has
        ([(0, 2)], [(0, 4)], []),  # a piece of which a side lacks the end
        ([(0, 2), (4, 6)], [(0, 6)], []),  # or the middle
        ([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)], [(0, 0), (2, 1)]),  # two bytes of one character
        ([], [(0, 1)], []),
    ],
)
def test_a_piece_has_all_its_characters_on_both_sides(left, right, found):
    assert [(ours.start, theirs.start) for ours, theirs in common_pieces(left, right)] == found


def test_white_space_that_a_tokenizer_trims_belongs_to_what_follows():
    assert tiled([(0, 2), (3, 5), (5, 5), (7, 8)]) == [(0, 2), (2, 5), (5, 5), (5, 8)]


@pytest.mark.parametrize(
    ("schulman", "per_piece"),
    [(False, [-1.5, 1.5, 0.0]), (True, [1.981689, 0.723130, 0.0])],  # k; k - 1 + exp(-k)
)
def test_the_kl_of_pieces_by_hand(schulman, per_piece):
    """The teacher gives ab|c|def|g -1 -2 -3 -1, the student a|bc|de|f|g -0.5 -1 -2 -2.5 -1: by piece -3 -3 -1 against
    -1.5 -4.5 -1, k = -1.5, 1.5, 0. The mean is over three pieces, not over four or five tokens."""
    pieces = Aligned([0, 1, 2, 3], [0, 1, 2, 3, 4], [2, 1, 1], [2, 2, 1])
    text = family("qwen3")
    (student_text,) = tokenize_with_spans(text, [render_student_reading(text, STYLE, "Q?", "4", "x")])
    config = replace(PAPER, use_schulman_kl_estimation=schulman)
    reward = TeacherReward(text, STYLE, config, 0.7, constant(0.0), constant(0.0))
    solution = [-0.25] * len(student_text.spans["solution"])
    given = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-0.5, -1.0, -2.0, -2.5, -1.0, *solution])
    scored = reward._combine(Reading(student_text, student_text, pieces, True), *given)
    assert scored.log_probs[1].tolist() == [-3.0, -3.0, -1.0]
    assert scored.log_probs[0].tolist() == [-1.5, -4.5, -1.0, *solution]
    mean, most = sum(per_piece) / 3, max(per_piece)
    assert scored.parts["reasoning_kl_mean"] == pytest.approx(mean, abs=1e-6)
    assert scored.kl_reward == pytest.approx(-(3 * mean + 0.03 * most), abs=1e-6)
    assert scored.solution_log_prob_reward == pytest.approx(-0.25 * 1.01)


def test_a_sum_of_one_token_is_that_token():
    values = torch.randn(100)
    assert torch.equal(piece_log_probs(values, [1] * 100), values)
    assert torch.equal(piece_log_probs(torch.cat([values, values]), [1] * 99 + [101])[:99], values[:99])


# Against an independent computation


def slow_log_probs(model, ids: list[int], temperature: float) -> list[float]:
    """Of every token but the first, alone in its pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double() / temperature
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()


def slow_characters(tokenizer, model, text: str, start: int, end: int, temperature: float) -> dict[int, float]:
    """The log-prob from `start` up to each end of a token in [start, end], by the place of that end.

    Places are counted in the tokens' own letters, of which a byte-level tokenizer has one for each byte.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    values, at, total, found = [0.0, *slow_log_probs(model, ids, temperature)], 0, 0.0, {}
    for token, value in zip(tokenizer.convert_ids_to_tokens(ids), values, strict=True):
        begun, at = at, at + len(token)
        if begun == start:
            found[0] = 0.0
        if start <= begun and at <= end:
            total += value
            found[at - start] = total
    return found


def slow_reward(tokenizers, models, row: dict, thought: str) -> dict[str, float]:
    (reads, writes), (student_model, teacher_model) = tokenizers, models
    prompt = render_teacher_prompt(writes, STYLE, row["question"], row["solution"])
    reading = render_student_reading(reads, STYLE, row["question"], row["solution"], f"\n\n{thought}")
    a, b = reading.spans["thought"]
    ours = slow_characters(reads, student_model, reading.text, a, b, 0.7)
    explained, place = f"{prompt}{thought}{END}", (len(prompt) - 2, len(prompt + thought))
    theirs = slow_characters(writes, teacher_model, explained, *place, 0.9)
    ends = sorted(ours.keys() & theirs.keys())
    k = [(theirs[y] - theirs[x]) - (ours[y] - ours[x]) for x, y in zip(ends, ends[1:], strict=False)]
    of_solution = slow_characters(reads, student_model, reading.text, *reading.spans["solution"], 0.7)
    places = sorted(of_solution)
    s = [of_solution[y] - of_solution[x] for x, y in zip(places, places[1:], strict=False)]
    r_ss, r_kl = sum(s) / len(s) + 0.01 * min(s), 3 * sum(k) / len(k) + 0.03 * max(k)
    return {"solution_log_prob_reward": r_ss, "kl_reward": -r_kl, "reward": r_ss - r_kl, "pieces": len(k)}


def ask(model):
    def log_probs(sequences, counted, temperature):
        with torch.no_grad():
            return token_log_probs(model, sequences, counted, temperature=temperature, token_budget=4096)[0]

    return log_probs


@pytest.fixture(scope="module")
def both(teacher, student):
    """Tokenizers and models, the student's first."""
    places = (student, teacher)
    return [load_tokenizer(place) for place in places], [load_frozen(place, torch.float32) for place in places]


def test_rewards_are_those_of_one_text_at_a_time(both):
    (reads, writes), (student_model, teacher_model) = both
    reward = TeacherReward(writes, STYLE, PAPER, 0.9, ask(teacher_model), ask(student_model), reads)
    texts = [f"{thought}{END}" for thought in THOUGHTS]
    readings = reward.read([ROW] * 3, texts)
    for reading, one, thought in zip(readings, reward.score([ROW] * 3, texts), THOUGHTS, strict=True):
        expected = slow_reward(*both, ROW, thought)
        pieces = reading.explanation
        assert len(pieces) == expected.pop("pieces")
        for name, value in expected.items():
            assert one.as_dict()[name] == pytest.approx(value, abs=2e-4), name
        shown = token_scores(reads, reading, one)
        assert "".join(text for text, *_ in shown["explanation"]) == f"\n\n{thought}"
        assert "".join(text for text, _ in shown["solution"]) == ROW["solution"]
    cut = [reading.explanation for reading in readings]
    assert all(max(pieces.left_sizes) > 1 or max(pieces.right_sizes) > 1 for pieces in cut[1:])
    assert any(len(pieces) < min(len(pieces.left), len(pieces.right)) for pieces in cut)


HOSTILE = [
    "Because 3 * 4 is 12.\n\n" + END,
    "",
    END,
    f"  \n {END}",
    "no end",
    "\U0001f600 \u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f467 caf\u00e9" + END,
    "<bos><|im_end|>\n<end_of_turn>\n" + END,
    "\ud800 lone\x00\x02content\x03" + END,
    "  many   spaces \t and\r\nlines\n\n\n" + END,
]


def test_a_tokenizer_that_does_the_same_gives_the_same_digits(teacher):
    own, twin = load_tokenizer(teacher), load_tokenizer(teacher)
    model = load_frozen(teacher, torch.float32)
    rewards = [TeacherReward(own, STYLE, PAPER, 0.9, ask(model), ask(model), other) for other in (None, twin)]
    alone, apart = (reward.score([ROW] * len(HOSTILE), HOSTILE) for reward in rewards)
    for one, other in zip(alone, apart, strict=True):
        assert one.as_dict() == other.as_dict()
        assert all(torch.equal(a, b) for a, b in zip(one.log_probs, other.log_probs, strict=True))


def test_hostile_completions_get_a_finite_reward_across_tokenizers(both):
    (reads, writes), (student_model, teacher_model) = both
    reward = TeacherReward(writes, STYLE, PAPER, 0.9, ask(teacher_model), ask(student_model), reads)
    readings = reward.read([ROW] * len(HOSTILE), HOSTILE)
    for reading, one in zip(readings, reward.score_readings(readings), strict=True):
        assert torch.isfinite(torch.tensor(one.reward))
        assert one.match_reward == (0.0 if reading.matched else -1.0)
    assert [reading.matched for reading in readings] == [True, False, False, False, False, True, True, True, True]


def test_trimmed_character_ranges_give_the_same_pieces(both):
    (_, writes), _ = both
    readers = [family("gemma3", size=420, text=SUMS, trim=trim) for trim in (False, True)]
    texts = [f"{thought}{END}" for thought in (*THOUGHTS, "two  spaces   and more")]
    rewards = [TeacherReward(writes, STYLE, PAPER, 0.9, constant(-1.0), constant(-2.0), reads) for reads in readers]
    whole, trimmed = (reward.read([ROW] * len(texts), texts) for reward in rewards)
    assert [one.explanation for one in whole] == [one.explanation for one in trimmed]


def test_a_collections_traces_are_ranked_by_a_student_with_another_tokenizer(both):
    (reads, writes), (student_model, teacher_model) = both
    prompts = prompt_token_ids(writes, [render_teacher_prompt(writes, STYLE, ROW["question"], ROW["solution"])] * 3)
    texts = [f"{thought}{END}" for thought in THOUGHTS]
    sampled = [writes(text, add_special_tokens=False)["input_ids"] for text in texts]
    whole = [slow_log_probs(teacher_model, prompt + ids, 0.9) for prompt, ids in zip(prompts, sampled, strict=True)]
    log_probs = [values[-len(ids) :] for values, ids in zip(whole, sampled, strict=True)]

    def behind(asked, tokens):
        return [slow_log_probs(teacher_model, [*ids, token], 0.9)[-1] for ids, token in zip(asked, tokens, strict=True)]

    scorer = TraceScorer(
        writes, STYLE, PAPER, None, student_model, behind, 0.9, lasting_log_probs(4096), reads
    )  # no pass of a teacher
    found, scored = scorer.score([ROW] * 3, prompts, sampled, log_probs)
    assert found == texts
    expected = [slow_reward(*both, ROW, thought)["reward"] for thought in THOUGHTS]
    assert [one.reward for one in scored] == pytest.approx(expected, abs=2e-4)


# Real runs


def test_a_student_with_another_tokenizer_trains_a_teacher(tiny_run, teacher, student, tmp_path, in_root, caplog):
    caplog.set_level("INFO", "rlt")
    models = [f"model_name_or_path={teacher}", f"student_model={student}"]
    trainer, _ = build([*tiny_run, *models], tmp_path, "max_steps=2", "eval_size=0", "save_steps=50")
    assert caplog.text.count("has another tokenizer than the teacher") == 1
    assert trainer.reward.student_tokenizer.bos_token == "<bos>"
    before = parameters_of(trainer.model)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 2
    assert all(torch.isfinite(torch.tensor(step["reward"])) for step in steps)
    assert all(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_held_out_questions_and_the_tables_of_a_run_have_both(tiny_run, teacher, student, tmp_path, in_root):
    models = [f"model_name_or_path={teacher}", f"student_model={student}"]
    plan = make_plan(config_of(*tiny_run, *models, "max_steps=1", f"output_dir={tmp_path}"))
    prepare_output(plan.config)
    run_plan(plan)
    evaluated = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluated] == [0, 1]
    assert all(torch.isfinite(torch.tensor(record["reward"])).all() for record in evaluated)


@pytest.mark.slow
def test_a_collection_is_ranked_by_a_student_with_another_tokenizer(student, tmp_path):
    (tmp_path / "short.yaml").write_text("explanation_tags: ['<explain>', '.']\n")  # any sentence ends an explanation
    style, folder = f"reasoning_format={tmp_path / 'short.yaml'}", tmp_path / "traces"
    lengths = ["dataset_size=3", "traces_per_question=2", "max_completion_length=32", "bf16=false"]
    done = launch("train.py", "collect_tiny", style, f"student_model={student}", *lengths, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("has another tokenizer than the teacher") == 1
    teacher = resolve_model_path(config_of("collect_tiny")["model_name_or_path"])
    models = [load_frozen(place, torch.float32) for place in (teacher, student)]
    reward = TeacherReward(
        load_tokenizer(teacher),
        load_format(str(tmp_path / "short.yaml")),
        PAPER,
        0.7,
        *map(ask, models),
        load_tokenizer(student),
    )
    traces = pandas.read_parquet(folder / "all/traces.parquet").to_dict("records")
    anew = reward.score(traces, [row["completion"] for row in traces])
    assert len(traces) == 6
    assert [row["reward"] for row in traces] == pytest.approx(
        [one.reward for one in anew], abs=2e-3
    )  # the teacher's by vLLM


def test_score_reads_each_model_in_its_own_tokens(both, teacher, student, tmp_path):
    line = {**ROW, "completions": [f"{thought}{END}" for thought in THOUGHTS]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    places = [f"input={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    done = launch("score.py", *places, f"teacher_model={teacher}", f"student_model={student}", "temperature=0.9")
    assert done.returncode == 0, done.stderr
    (scored,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [slow_reward(*both, ROW, thought)["reward"] for thought in THOUGHTS]
    assert scored["reward"] == pytest.approx(expected, abs=2e-4)
