"""From rows to what trainers take: nothing that a row brings is lost, and nothing is cut without a word."""

import asyncio
import json
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import EMBEDDED, build, config_of
from datasets import Dataset

from rlt.planning.trl_fields import typed_settings
from rlt.prompts.examples import ends_inside
from rlt.prompts.rendering import ANSWER_LINE
from rlt.prompts.styles import load_format
from rlt.rewards.exact import exact_answer
from trainers.build import of_numbers
from trainers.examples import question_prompt, sft_examples, whole_pairs, with_all_columns

STYLE = load_format("stratos")


def test_a_column_that_the_first_row_lacks_reaches_the_reward():
    rows = [{"question": "1"}, {"question": "2", "student_system_prompt": "Be brief."}]
    assert Dataset.from_list(with_all_columns(rows))[1]["student_system_prompt"] == "Be brief."
    assert with_all_columns(rows)[0] == {"question": "1", "student_system_prompt": None}


def test_rows_with_prompts_of_their_own_are_sampled_and_read_with_them(tiny_run, tmp_path, in_root):
    rows = [{"question": f"What is {n} + 1?", "solution": str(n + 1)} for n in range(12)]
    for row in rows[1:]:
        row |= {"teacher_system_prompt": "Teach!", "student_system_prompt": "Learn!"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [f"dataset_id_or_path={tmp_path / 'rows.jsonl'}", "dataset_size=null", "eval_size=0"]
    trainer, _ = build(tiny_run, tmp_path / "run", *source)
    found = {row["teacher_system_prompt"]: row["prompt"] for row in trainer.train_dataset}
    assert set(found) == {None, "Teach!"}
    assert "Teach!" in found["Teach!"] and "Teach!" not in found[None]


@pytest.mark.parametrize(
    ("run", "asked"),
    [
        (["grpo_exact"], "Q<|im_end|>"),
        (["grpo_exact", "answer_line=true"], f"Q{ANSWER_LINE}"),
        (["grpo_verifier_tiny"], "Learn!"),
        (["grpo_verifier_tiny", "use_dataset_system_prompt=true"], "Its own"),
        (["grpo_verifier_tiny", "answer_line=true"], f"Q{ANSWER_LINE}"),
    ],
)
def test_plain_grpo_asks_for_what_its_reward_looks_for(run, asked, tokenizer):
    settings = typed_settings(config_of(*run))
    row = {"question": "Q", "solution": "A", "student_system_prompt": "Learn!", "system": "Its own"}
    assert asked in question_prompt(settings, STYLE)(tokenizer, row, settings)


async def later(completions, **_):
    return completions


@pytest.mark.parametrize(
    ("function", "rewards", "says"),
    [
        (lambda completions, **_: completions, ["1.0", "2.0"], "my.reward returned '1.0': a list with a number"),
        (lambda completions, **_: [1.0, *completions[1:]], ["1.0", "2.0"], "my.reward returned '2.0': a list"),
        (lambda completions, **_: [[1.0] for _ in completions], ["a"], r"my.reward returned '\[1.0\]': a list"),
        (lambda completions, **_: None, ["a"], "my.reward returned 'None': a list"),
        (lambda completions, **_: asyncio.run(later(completions)), ["3"], "my.reward returned '3': a list"),
    ],
)
def test_a_reward_that_is_no_number_names_its_function(function, rewards, says):
    with pytest.raises(ValueError, match=says):
        of_numbers("my.reward", function)(rewards)


def test_rewards_that_are_numbers_stay_as_they_are():
    for rewards in ([1.0, None, 2], numpy.array([0.5, 1.0], dtype="float32"), torch.tensor([0.5, 1.0])):
        assert of_numbers("my.reward", lambda rewards: rewards)(rewards) == list(rewards)
    assert of_numbers("my.reward", exact_answer).__name__ == "exact_answer"
    awaited = of_numbers("my.reward", later)
    assert awaited.__name__ == "later" and asyncio.run(awaited([0.5])) == [0.5]
    with pytest.raises(ValueError, match="my.reward returned 'a'"):
        asyncio.run(awaited(["a"]))


def test_what_ends_a_section_inside_a_text_that_is_learned_is_counted_and_said_once(tokenizer, caplog):
    source = ["dataset_id_or_path=traces", "max_length=null"]
    settings = typed_settings(config_of("student_sft_tiny", f"model_name_or_path={EMBEDDED}", *source))
    traces = ["plain", f"a<|im_end|>b{STYLE.thought_tags[1]}", "a<|im_end|>", f"to {STYLE.explanation_tags[1]}"]
    rows = [{"question": "Q", "solution": "1", "reasoning_trace": trace} for trace in traces]
    assert len(sft_examples(settings, rows, tokenizer, STYLE)) == 4
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        "traces: the texts of rows hold what ends a text or a section (<|end_of_thought|> in 1, <|im_end|> in 2)"
        in said
    )
    caplog.clear()
    assert len(sft_examples(settings, rows[:1], tokenizer, STYLE)) == 1 and not caplog.records
    assert ends_inside(tokenizer, STYLE, rows[3], student=False) == {STYLE.explanation_tags[1]}


def test_pairs_that_would_be_cut_are_left_out_and_counted(tokenizer, caplog):
    short, long = (
        {"prompt": "a b", "chosen": " c", "rejected": " d"},
        {"prompt": "a b", "chosen": " c", "rejected": " d" * 9},
    )
    settings = typed_settings(config_of("dpo_tiny", "max_length=5", "dataset_id_or_path=traces"))
    assert whole_pairs(settings, [short, long, short], tokenizer) == [short, short]
    assert "1 rows left out: longer than max_length=5" in caplog.text
    assert len(whole_pairs(replace(settings, max_length=None), [short, long], tokenizer)) == 2
    with pytest.raises(ValueError, match="max_length=5: every pair has a longer side"):
        whole_pairs(settings, [long], tokenizer)
