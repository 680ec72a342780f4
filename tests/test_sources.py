"""Where rows come from: every kind of source, what is left out, and what is refused."""

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from rlt.data.benchmarks import BENCHMARKS, _with_options
from rlt.data.generator import generator_tasks
from rlt.data.sources import inspect_source, load_rows
from rlt.data.splits import check_disjoint, hold_out, questions_of

ROOT = Path(__file__).resolve().parent.parent
ROW = {"question": "2 + 2?", "solution": "4", "reasoning_trace": "Two and two."}
STRATOS = (
    "<|begin_of_thought|>\n\nTwo and\ntwo.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"
)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(path: Path, rows: list[dict]) -> str:
    """The rows in the kind of file that the suffix names."""
    if path.suffix == ".jsonl":
        return write_lines(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    second = {"question": "Größe?", "solution": 'a,\n"b"', "reasoning_trace": None}
    source = write(tmp_path / f"rows{suffix}", [ROW, second])
    inspect_source(source)
    assert load_rows(source).rows == [ROW, second]


def test_a_missing_value_is_no_text_and_half_a_character_is_no_characters_end(tmp_path):
    row = {**ROW, "question": "2 + 2 \ud83d", "student_system_prompt": float("nan"), "system": "Be brief."}
    (read,) = load_rows(write(tmp_path / "rows.jsonl", [row])).rows
    assert read == {**ROW, "question": "2 + 2 ?", "system": "Be brief."}


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.csv", [{**ROW, "question": "second"}])
    write(tmp_path / "a.jsonl", [{**ROW, "question": "first"}])
    inspect_source(str(tmp_path))
    assert [row["question"] for row in load_rows(str(tmp_path)).rows] == ["first", "second"]


def test_a_folder_saved_by_datasets_is_read_by_split(tmp_path):
    DatasetDict({"train": Dataset.from_list([ROW]), "test": Dataset.from_list([ROW, ROW])}).save_to_disk(tmp_path / "d")
    inspect_source(str(tmp_path / "d"))
    assert len(load_rows(str(tmp_path / "d"), split="test").rows) == 2
    with pytest.raises(ValueError, match="no split 'dev'; found test, train"):
        load_rows(str(tmp_path / "d"), split="dev")


def test_an_empty_folder_is_refused(tmp_path):
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="holds no file of .jsonl"):
            ask(str(tmp_path))


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path):
    rows = [ROW, {**ROW, "question": " \n"}, {**ROW, "solution": ""}, {**ROW, "solution": None}]
    loaded = load_rows(write_lines(tmp_path / "r.jsonl", rows))
    assert loaded.rows == [ROW]
    assert loaded.dropped == {"empty question": 1, "empty solution": 2}


def test_numbers_become_text_and_zero_is_an_answer(tmp_path):
    source = write_lines(tmp_path / "r.jsonl", [{"question": 7, "solution": 0}, {"question": "q", "solution": 1.5}])
    assert [row["solution"] for row in load_rows(source).rows] == ["0", "1.5"]


def test_a_missing_number_in_a_table_is_an_empty_solution(tmp_path):
    table = pyarrow.table({"question": ["a", "b"], "solution": [float("nan"), 2.0]})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    loaded = load_rows(str(tmp_path / "r.parquet"))
    assert ([row["solution"] for row in loaded.rows], loaded.dropped) == (["2.0"], {"empty solution": 1})


def test_system_prompts_and_own_columns_are_carried_with_their_types(tmp_path):
    carried = {"system": "s", "teacher_system_prompt": "t", "student_system_prompt": "u"}
    own = {"difficulty": 3, "share": 0.5, "easy": True, "tests": [{"in": 1}, {"out": "2"}], "note": "a"}
    source = write_lines(tmp_path / "r.jsonl", [{**ROW, **carried, **own}])
    assert load_rows(source).rows == [{**ROW, **carried, **own}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_missing_cell_of_an_own_column_is_none_in_every_kind_of_file(tmp_path, suffix):
    source = write(tmp_path / f"rows{suffix}", [{**ROW, "level": "hard"}, {**ROW, "level": None}])
    assert [row["level"] for row in load_rows(source).rows] == ["hard", None]


def test_what_json_does_not_have_becomes_text_and_no_number_none(tmp_path):
    when = datetime.date(2026, 1, 31)
    table = pyarrow.table({"question": ["q"], "solution": ["s"], "when": [when], "level": [float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    (row,) = load_rows(str(tmp_path / "r.parquet")).rows
    assert (row["when"], row["level"]) == ("2026-01-31", None)


def test_a_conversations_own_columns_are_carried_without_the_conversation(tmp_path):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": STRATOS}]
    source = write_lines(tmp_path / "r.jsonl", [{"conversations": messages, "difficulty": 3}])
    assert load_rows(source).rows == [{**ROW, "reasoning_trace": "Two and\ntwo.", "difficulty": 3}]


def test_a_column_with_a_name_of_trls_is_renamed_unless_the_new_name_is_taken(tmp_path):
    source = write_lines(tmp_path / "r.jsonl", [{**ROW, "prompt": "p", "completions": [1]}])
    assert load_rows(source).rows == [{**ROW, "data_prompt": "p", "data_completions": [1]}]
    source = write_lines(tmp_path / "r.jsonl", [{**ROW, "prompt": "p", "data_prompt": "q"}])
    with pytest.raises(ValueError, match="row 1 has columns 'prompt' and 'data_prompt'"):
        load_rows(source)


def test_size_counts_usable_rows(tmp_path):
    source = write_lines(tmp_path / "r.jsonl", [{**ROW, "question": ""}, ROW, ROW, ROW])
    loaded = load_rows(source, size=2)
    assert (len(loaded.rows), loaded.dropped) == (2, {"empty question": 1})
    with pytest.raises(ValueError, match="size=0 must be positive"):
        load_rows(source, size=0)


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_a_conversation_is_taken_apart_by_its_tags(tmp_path, keys):
    who, what = keys
    messages = [{who: "user", what: "2 + 2?"}, {who: "assistant", what: STRATOS}]
    source = write_lines(tmp_path / "r.jsonl", [{"system": "Think.", "conversations": messages}])
    inspect_source(source)
    assert load_rows(source).rows == [{**ROW, "reasoning_trace": "Two and\ntwo.", "system": "Think."}]


def test_tags_of_another_style_are_those_asked_for(tmp_path):
    tags = (("<think>", "</think>"), ("<answer>", "</answer>"))
    text = "<think>Two and two.</think><answer>4</answer>"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": text}]
    source = write_lines(tmp_path / "r.jsonl", [{"conversations": messages}])
    assert load_rows(source, tags=tags).rows == [ROW]
    assert load_rows(source).dropped == {"no thought or solution tags": 1}


def test_messages_in_parts_and_a_system_turn_are_read_as_text(tmp_path):
    answer = "<|begin_of_thought|>1.<|end_of_thought|>\n\n<|begin_of_solution|>2<|end_of_solution|>"
    user = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]}
    system, gpt = {"from": "system", "value": "Be terse."}, {"from": "gpt", "value": answer}
    picture = {"role": "user", "content": [{"type": "image", "image": "x.png"}]}
    rows = [{"conversations": c} for c in ([system, user, gpt], [user, gpt], [picture, gpt], [system, gpt])]
    rows.append({"conversations": [system, user, gpt], "system": "Mine."})
    loaded = load_rows(write_lines(tmp_path / "r.jsonl", rows))
    assert [(row["question"], row.get("system")) for row in loaded.rows] == [
        ("What is 1 + 1?", "Be terse."),
        ("What is 1 + 1?", None),
        ("What is 1 + 1?", "Mine."),
    ]
    assert loaded.dropped == {
        "conversation has parts that are no text": 1,
        "conversation is not one question and one answer": 1,
    }


def test_binary_columns_are_text_and_numbers_are_written_out(tmp_path):
    table = pyarrow.table(
        {
            "question": pyarrow.array([b"1 + 2?", "½ + ½?".encode()], pyarrow.binary()),
            "solution": pyarrow.array([0.00001, 1.0]),
            "own": pyarrow.array([b"a", b"b"], pyarrow.binary()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet")).rows
    assert [(row["question"], row["solution"], row["own"]) for row in rows] == [
        ("1 + 2?", "0.00001", "a"),
        ("½ + ½?", "1.0", "b"),
    ]


def test_conversations_that_are_no_question_and_answer_are_counted(tmp_path):
    user, assistant = {"from": "user", "value": "q"}, {"from": "assistant", "value": STRATOS}
    rows = [{"conversations": c} for c in ([user], [assistant, user], [user, assistant, user], None)]
    loaded = load_rows(write_lines(tmp_path / "r.jsonl", rows))
    assert (loaded.rows, loaded.dropped) == ([], {"conversation is not one question and one answer": 4})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_found_and_the_file(tmp_path, suffix):
    source = write(tmp_path / f"rows{suffix}", [{"question": "q", "answer": "a"}])
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="no column 'solution'; found answer, question") as caught:
            ask(source)
        assert source in str(caught.value)


def test_a_row_that_lacks_a_column_is_named_by_its_number(tmp_path):
    source = write_lines(tmp_path / "r.jsonl", [ROW, {"question": "q"}])
    inspect_source(source)  # looks at the first row only
    with pytest.raises(ValueError, match="row 2 has no column 'solution'"):
        load_rows(source)


def test_a_csv_row_that_is_too_long_or_too_short_does_not_raise(tmp_path):
    (tmp_path / "r.csv").write_text("question,solution\nq,a,b,c\nq\n")
    loaded = load_rows(str(tmp_path / "r.csv"))
    assert (len(loaded.rows), loaded.dropped) == (1, {"empty solution": 1})


def test_a_csv_field_longer_than_the_default_limit_is_read(tmp_path):
    source = write(tmp_path / "r.csv", [{**ROW, "reasoning_trace": "x" * 200_000}])
    assert len(load_rows(source).rows[0]["reasoning_trace"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"question": "q", "solution": "s"}\n\n{"question": \n', "line 3 is not JSON"),
        ("r.jsonl", b'["q", "s"]\n', "line 1 is not a JSON object"),
        ("r.jsonl", b'{"question": "\xff", "solution": "s"}\n', "line 1 is not UTF-8"),
        ("r.jsonl", b'{"question": ["q"], "solution": "s"}\n', "question must be text, it is a list"),
        ("r.json", b'{"question": "q", "solution": "s"}', "must hold one list of objects"),
        ("r.json", b"[", "is not JSON"),
        ("r.json", b'{"question": "q"}\n{"question": "p"}\n', "Extra data.: one object a line is a .jsonl"),
        ("r.csv", b"question,solution\nq,\xff\n", "cannot be read as CSV"),
        ("r.parquet", b"no parquet at all", "is not a Parquet file"),
        ("r.txt", b"q", "is none of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("source", ["missing.jsonl", "a/missing.csv", "./missing", "/no/where", "~/no/where", "name"])
def test_a_missing_file_is_said_to_be_missing(source):
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="does not exist"):
            ask(source)


def test_a_hub_name_is_not_looked_up_by_the_inspection():
    assert inspect_source("nobody/nothing") is None


def test_a_hub_name_without_network_is_one_value_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing is no local file and could not be loaded from the hub"):
        load_rows("nobody/nothing")


def test_generated_rows_follow_seed_and_size_and_carry_the_worked_solution():
    first = load_rows("reasoning_gym/gsm_symbolic", seed=3, size=4)
    assert first == load_rows("reasoning_gym/gsm_symbolic", seed=3, size=4)
    assert first.rows != load_rows("reasoning_gym/gsm_symbolic", seed=4, size=4).rows
    assert len(first.rows) == 4
    for row in first.rows:
        assert set(row) == {"question", "solution", "reasoning_trace", "task", "metadata"}
        assert row["reasoning_trace"].endswith(f"#### {row['solution']}")


def test_a_task_without_worked_solutions_gives_rows_without_a_trace():
    (row,) = load_rows("reasoning_gym/lcm", size=1).rows
    assert row["reasoning_trace"] is None and row["task"] == "lcm"


def test_tasks_read_from_the_source_are_those_that_are_registered():
    from reasoning_gym.factory import DATASETS

    assert set(generator_tasks()) == set(DATASETS) - {"composite"}


def test_an_unknown_task_names_those_that_are_close():
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="no task 'gsm_symbolik'; did you mean gsm_symbolic"):
            ask("reasoning_gym/gsm_symbolik")


def test_the_inspection_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from rlt.data.sources import inspect_source\n"
        "inspect_source('reasoning_gym/gsm_symbolic')\n"
        "assert not {'torch', 'transformers', 'datasets', 'reasoning_gym', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def questions(rows: list[dict]) -> list[str]:
    return [row["question"] for row in rows]


def test_held_out_questions_are_never_trained_on_and_repeats_are_counted():
    # "A?" and its two respellings are one question; whichever way the choice falls, both sides stay apart.
    rows = [{"question": q} for q in ["A?", "b?", " a?  ", "C?", "a?", "d e?", "D\nE?"]]
    for seed in range(20):
        train, held_out, repeated = hold_out(rows, 2, seed)
        check_disjoint(train, held_out)
        assert len(held_out) == 2 and len(train) + len(held_out) + repeated == 7
    assert {hold_out(rows, 2, seed)[2] for seed in range(20)} == {0, 1, 2, 3}


def test_the_split_follows_the_seed_and_training_rows_keep_their_order():
    rows = [{"question": f"question {i}"} for i in range(50)]
    train, held_out, repeated = hold_out(rows, 10, seed=1)
    assert hold_out(rows, 10, seed=1) == (train, held_out, repeated)
    assert questions(hold_out(rows, 10, seed=2)[1]) != questions(held_out)
    assert train == [row for row in rows if row not in held_out] and repeated == 0


def test_questions_that_a_model_learned_before_are_held_out_last():
    rows = [{"question": f"Question {i}"} for i in range(10)]
    new = rows[2:5]
    learned = questions_of(row for row in rows if row not in new)
    assert sorted(questions(hold_out(rows, 3, 0, learned)[1])) == questions(new)
    assert set(questions(new)) < set(questions(hold_out(rows, 5, 0, learned)[1]))
    assert hold_out(rows, 5, 0, {"another"}) == hold_out(rows, 5, 0)


def test_nothing_is_held_out_when_nothing_is_asked_for():
    rows = [{"question": "a"}, {"question": "a"}]
    assert hold_out(rows, 0, seed=0) == (rows, [], 0)


def test_holding_out_every_question_is_refused():
    with pytest.raises(ValueError, match="eval_size=2 leaves nothing of 2 questions"):
        hold_out([{"question": "a"}, {"question": "A"}, {"question": "b"}], 2, seed=0)


def test_shared_questions_are_refused_with_their_number_and_the_first():
    train = [{"question": "What is  2?"}, {"question": "b"}]
    with pytest.raises(ValueError, match="2 evaluation rows .* the first: 'what is 2\\?'"):
        check_disjoint(train, [{"question": "new"}, {"question": "what is 2?"}, {"question": "B"}])


def test_a_task_takes_options_and_names_those_it_has_not():
    rows = load_rows("reasoning_gym/gcd/max_value:3/max_numbers:2", size=20).rows
    assert {row["solution"] for row in rows} <= {"1", "2", "3"}
    with pytest.raises(ValueError, match="unexpected keyword argument 'largest'"):
        load_rows("reasoning_gym/gcd/largest:3", size=1)
    with pytest.raises(ValueError, match="'max_value' is no option:value"):
        inspect_source("reasoning_gym/gcd/max_value")


def test_of_several_forms_of_one_table_a_folder_gives_one(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        write(tmp_path / f"traces{suffix}", [ROW, ROW])
    assert len(load_rows(str(tmp_path)).rows) == 2


def test_options_of_a_multiple_choice_benchmark_are_mixed_in_a_fixed_order():
    known = BENCHMARKS["gpqa_diamond"]
    wrong = {column: f"wrong {i}" for i, column in enumerate(known.wrong)}
    row = {"Question": "Which?", known.answer: "right", **wrong}
    made = [_with_options(row, known, number) for number in range(20)]
    assert made == [_with_options(row, known, number) for number in range(20)]
    assert {m["solution"] for m in made} == set("ABCD")
    assert all(f"{m['solution']}) right" in m["question"] for m in made)
    with pytest.raises(ValueError, match="no benchmark 'aime'"):
        inspect_source("benchmark/aime")


@pytest.mark.parametrize("task", ["gsm_symbolic", "leg_counting"])
def test_neighbouring_seeds_share_no_question(task):
    first, second = (
        {row["question"] for row in load_rows(f"reasoning_gym/{task}", seed=s, size=60).rows} for s in (0, 1)
    )
    assert not first & second


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_conversation_that_is_json_text_is_read_as_one(tmp_path, suffix):
    messages = [{"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": STRATOS}]
    source = write(tmp_path / f"rows{suffix}", [{"conversations": json.dumps(messages), "system": "Think."}])
    inspect_source(source)
    assert load_rows(source).rows == [{**ROW, "reasoning_trace": "Two and\ntwo.", "system": "Think."}]


def test_conversations_that_are_no_list_of_messages_are_counted(tmp_path):
    wrong = ["user: 2 + 2?", "[{'from': 'user'}]", '"text"', '{"from": "user"}', '["a", "b"]', 7]
    tables = [{"conversations": c} for c in (*wrong, ["a", "b"], {"from": ["user"], "value": ["q"]})]
    loaded = load_rows(write_lines(tmp_path / "r.jsonl", tables))
    assert loaded.rows == []
    assert loaded.dropped == {"conversations are neither a list of messages nor the JSON of one": 8}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_that_the_system_does_not_read_is_named(tmp_path, suffix):
    source = tmp_path / f"rows{suffix}"
    source.symlink_to("/proc/self/mem")  # a file whose first byte nobody may read
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match=f"{source} (cannot be read|is not a Parquet file)"):
            ask(str(source))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_folder_among_the_files_of_a_folder_is_named(tmp_path, suffix):
    (tmp_path / f"part{suffix}").mkdir()
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match=f"part{suffix}"):
            ask(str(tmp_path))


def test_a_csv_header_that_is_not_utf_8_is_named_by_its_file(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"question,solution\xff\nq,s\n")
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="r.csv line 1 cannot be read as CSV"):
            ask(str(tmp_path / "r.csv"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.jsonl", "[" * 200_000),
        ("deep.json", "[" * 200_000),
        ("deep.jsonl", '{"question": ' + "[" * 200_000 + "]" * 200_000 + "}"),
        ("deep.jsonl", json.dumps({"conversations": "[" * 200_000})),
        ("deep.csv", "conversations\n" + "[" * 200_000),
    ],
)
def test_what_is_nested_without_end_is_refused_in_one_line(name, text, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.* is nested too deeply to be read$"):
        load_rows(str(file))


def in_a_gib_more(call: str) -> subprocess.CompletedProcess:
    """In a process that may take no more memory than it has once the project is imported, and a GiB."""
    code = (
        "import psutil, pyarrow.parquet, resource\n"
        "from rlt.data.sources import load_rows\n"
        "most = psutil.Process().memory_info().vms + 2**30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        f"print(len({call}.rows))\n"
    )
    plain = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # others reserve addresses by the GiB
    environment = {**os.environ, **plain}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("length", [1_000, 4_000_000])
def test_a_small_file_of_one_text_many_times_is_refused_before_memory_ends(length, tmp_path):
    count = 4 * 2**30 // length
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), ["x" * length])
    file = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": same, "solution": same}), file, compression="zstd")
    assert file.stat().st_size < 2**20
    done = in_a_gib_more(f"load_rows({str(file)!r})")
    assert re.search(r"its first \d+ rows take 0.\d GiB, and [01].\d GiB were free: set dataset_size", done.stderr)
    few = in_a_gib_more(f"load_rows({str(file)!r}, size=3)")
    assert few.stdout == "3\n", few.stderr


def test_a_parquet_file_whose_pages_are_larger_than_memory_is_refused_before_they_are_read(tmp_path):
    file = tmp_path / "wide.parquet"
    text = pyarrow.array(["x" * 2**20] * 800)
    table = pyarrow.table({"question": text, "solution": text})
    pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=False)
    done = in_a_gib_more(f"load_rows({str(file)!r})")
    assert re.search(r"a group of its rows takes 1.6 GiB, and [01].\d GiB of memory are free", done.stderr)


def test_a_parquet_file_with_broken_pages_is_named(tmp_path):
    source = tmp_path / "r.parquet"
    table = pyarrow.table({"question": [str(i) for i in range(2000)], "solution": ["s"] * 2000})
    pyarrow.parquet.write_table(table, source)
    content = source.read_bytes()
    source.write_bytes(content[:4] + bytes(3000) + content[3004:])  # the footer, which is read first, is whole
    inspect_source(str(source))
    with pytest.raises(ValueError, match="r.parquet is not a Parquet file, or a damaged one"):
        load_rows(str(source))


@pytest.mark.parametrize(
    ("name", "content"),
    [("data-00000-of-00001.arrow", b"short"), ("dataset_info.json", b"{"), ("state.json", b"{}"), ("state.json", None)],
)
def test_a_saved_dataset_with_a_damaged_file_is_named(tmp_path, name, content):
    Dataset.from_list([ROW]).save_to_disk(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path} holds a saved dataset that cannot be loaded"):
        load_rows(str(tmp_path))
