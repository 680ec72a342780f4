"""From rows to what trainers take: nothing that a row brings is lost, and nothing is cut without a word."""

import json
from dataclasses import replace

import pytest
from conftest import build, config_of
from datasets import Dataset

from rlt.planning.trl_fields import typed_settings
from rlt.prompts.rendering import ANSWER_LINE
from rlt.prompts.styles import load_format
from trainers.examples import question_prompt, whole_pairs, with_all_columns

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
