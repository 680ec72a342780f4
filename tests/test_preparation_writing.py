"""What is written has the form that is asked for, and the runs that read it find all of it."""

import json
from pathlib import Path

import pytest
from conftest import EMBEDDED, ROOT, config_of
from preparation import dropped, kept, run, settings_of, write_rows

from rlt.data.sources import load_rows
from rlt.errors import Refused
from rlt.formats import FORMATS, Options, apply
from rlt.formats.record import Dropped, make_record, message
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_tokenizer
from rlt.planning.plan import make_plan
from rlt.preparation.prerequisites import check_machine
from rlt.preparation.write import FORMS, as_chat, as_preference, as_rows, as_text

FORMATS_HERE = ROOT / "tests" / "data" / "formats"
ALL = [{"path": str(path), "format": path.stem} for path in sorted(FORMATS_HERE.glob("*.jsonl"))]


def prepared(folder: Path, *sources, **keys) -> tuple[list[dict], dict]:
    """The rows that were written, and the results by stage."""
    keys = {"stages": ["read", "split", "write"], "engine_tasks": 2, "allow_empty_sources": True, **keys}
    results = run(settings_of(folder / "out", list(sources), **keys))
    files = sorted((folder / "out" / "prepared").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()], results


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_all_formats_are_written_or_dropped_with_a_reason(tmp_path, form):
    rows, results = prepared(tmp_path, *ALL, to=form)
    write = results["write"]
    assert write.counts.kept == len(rows) > 0
    assert write.counts.read == results["read"].counts.kept == len(rows) + len(dropped(write))
    assert len({row["id"] for row in rows}) == len(rows)
    assert write.counts.notes == {"rows of train": len(rows)}


def test_rows_are_question_solution_thought_answer_and_system():
    turns = [message("system", "Be brief."), message("user", "q"), message("assistant", "s", thinking="t")]
    assert as_rows(make_record("chat", messages=turns, answer="a")) == {
        "question": "q",
        "solution": "s",
        "reasoning_trace": "t",
        "answer": "a",
        "system": "Be brief.",
    }
    assert "system" not in as_rows(make_record("chat", messages=turns[1:]))


def test_a_question_without_an_answer_of_its_own_has_the_gold_one_as_solution():
    row = as_rows(make_record("rl", messages=[message("user", "q")], answer="4"))
    assert row == {"question": "q", "solution": "4", "reasoning_trace": None, "answer": "4"}


USER, ANSWER = message("user", "q"), message("assistant", "s")
CALLS = message("assistant", None, tool_calls=[{"id": "1", "name": "f", "arguments": {}}])
NOT_ROWS = {
    "of kind text, not a question": make_record("text", text="x"),
    "of kind preference, not a question": make_record(
        "preference", messages=[USER], chosen=[ANSWER], rejected=[ANSWER]
    ),
    "calls tools": make_record("chat", messages=[USER, CALLS]),
    "not one question and one answer": make_record("chat", messages=[USER, ANSWER, USER, ANSWER]),
    "no solution": make_record("rl", messages=[USER], tests="assert f()"),
}


@pytest.mark.parametrize(("reason", "record"), NOT_ROWS.items())
def test_what_is_no_question_with_a_solution_is_dropped_as_rows(reason, record):
    assert as_rows(record) == Dropped(reason)


def test_other_forms_drop_what_they_are_not():
    assert as_rows(make_record("chat", messages=[ANSWER, USER])) == Dropped("not one question and one answer")
    assert as_chat(make_record("rl", messages=[USER])) == Dropped("a question without an answer")
    assert as_chat(make_record("text", text="x")) == Dropped("of kind text, not a conversation")
    assert as_preference(make_record("text", text="x")) == Dropped("of kind text, not a preference")
    assert as_text(make_record("chat", messages=[USER, ANSWER])) == Dropped("of kind chat, not text")


@pytest.mark.parametrize("name", ["messages", "hermes", "glaive", "toolbench", "openr1", "harmony_agent"])
def test_conversations_that_are_written_are_read_back_as_they_were(tmp_path, name):
    """Calls, results, thoughts, tools and which turns are trained."""
    rows, results = prepared(tmp_path, {"path": str(FORMATS_HERE / f"{name}.jsonl"), "format": name}, to="chat")
    records = {row["id"]: row for row in kept(results["write"])}
    assert len(rows) == len(records) > 0
    for row in rows:
        again = apply(FORMATS["messages"], row, Options())
        before = records[row["id"]]
        assert [again[key] for key in ("messages", "tools")] == [before[key] for key in ("messages", "tools")]


def test_preferences_are_lists_of_messages_as_trl_takes_them(tmp_path):
    from trl import apply_chat_template

    rows, _ = prepared(tmp_path, {"path": str(FORMATS_HERE / "harmony_preference.jsonl")}, to="preference")
    (row,) = [row for row in rows if row["prompt"] == [{"role": "user", "content": "Name a prime."}]]
    rendered = apply_chat_template(row, load_tokenizer(str(embedded_model_path(EMBEDDED))))
    assert rendered["prompt"].endswith("Name a prime.<|im_end|>\n<|im_start|>assistant\n")
    assert (rendered["chosen"], rendered["rejected"]) == ("Seven.<|im_end|>\n", "Eight.<|im_end|>\n")


def test_the_runs_here_read_what_was_written_and_find_all_rows(tmp_path):
    gsm8k = {"path": str(FORMATS_HERE / "gsm8k.jsonl"), "format": "gsm8k"}
    rows, _ = prepared(tmp_path, gsm8k)
    loaded = load_rows(str(tmp_path / "out"))
    assert (len(loaded.rows), loaded.dropped) == (len(rows), {}) == (3, {})
    first = next(row for row in loaded.rows if row["solution"] == "48")
    assert first["reasoning_trace"] == "In April Mira sells 36/3 = 12 eggs.\nIn all she sells 36+12 = 48 eggs."
    assert first["answer"] == "48" and first["source"] == "gsm8k" and first["id"].startswith("gsm8k:0:")
    given = {key: first[key] for key in ("question", "solution", "reasoning_trace")}
    again, _ = prepared(tmp_path / "again", write_rows(tmp_path / "own.jsonl", [given]))
    assert {key: again[0][key] for key in given} == given


def test_a_warm_up_of_a_teacher_takes_what_was_written(tmp_path):
    prepared(tmp_path, {"path": str(FORMATS_HERE / "gsm8k.jsonl"), "format": "gsm8k"})
    named = [f"dataset_id_or_path={tmp_path / 'out'}", f"output_dir={tmp_path / 'warm'}"]
    assert make_plan(config_of("run_cfg=teacher_sft_tiny", *named)).missing == ()


def test_no_file_of_an_earlier_run_stays(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": f"{n}?", "solution": "s"} for n in range(4)])
    prepared(tmp_path, path, engine_tasks=3, validation_share=0.5)
    prepared(tmp_path, path, engine_tasks=1)
    names = sorted(file.name for file in (tmp_path / "out" / "prepared").iterdir())
    assert names == ["train-00000.jsonl"]
    assert len(load_rows(str(tmp_path / "out")).rows) == 4


def test_held_out_rows_stand_in_files_of_their_own(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": f"{n}?", "solution": "s"} for n in range(100)])
    _, results = prepared(tmp_path, path, validation_share=0.3)
    notes = results["write"].counts.notes
    held_out = len(load_rows(str(tmp_path / "out"), split="validation").rows)
    assert 15 < held_out == notes["rows of validation"] == 100 - notes["rows of train"] < 45


def test_a_form_that_does_not_exist_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(Refused, match="to=novel: use one of rows, chat, preference, text"):
        check_machine(settings_of(tmp_path / "out", [path], to="novel"))
