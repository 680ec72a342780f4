"""What a source is, by its names, by the first rows of all its files, and by the version that is read."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from preparation import kept, run, settings_of, write_rows

from rlt.errors import Refused
from rlt.formats.inputs import check_inputs, parse_sources
from rlt.formats.readers import Bad, plain_rows
from rlt.preparation.read import Read
from rlt.preparation.stage import Place, Task


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "A row."}\n')
    return folder


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["gsm8k/train.jsonl", "gsm8k/test.jsonl"], "gsm8k"),
        (["gsm8k/train.jsonl", "gsm8k/test.jsonl"], "gsm8k/*.jsonl"),
        (["gsm8k/train.jsonl", "gsm8k/test.jsonl"], "gsm8k/t*"),
        (["openai/gsm8k/main/test-00000-of-00001.jsonl"], "openai/gsm8k/main"),
        (["data/openai_humaneval/rows.jsonl"], "data/openai_humaneval"),
        (["data/my_humaneval_copy.jsonl"], "data"),
        (["mmlu/abstract_algebra/test-0.jsonl"], "mmlu/*/*.jsonl"),
        (["ai2_arc/ARC-Easy/test.jsonl"], "ai2_arc/ARC-Easy"),
        (["mbpp/full/train-0.jsonl", "mbpp/full/test-0.jsonl"], "mbpp/full"),
        (["sanitized-mbpp.json"], "*.json"),
    ],
)
def test_a_file_of_an_evaluation_is_found_behind_a_folder_and_a_glob(tmp_path, names, source):
    touched(tmp_path / "x", *names)
    with pytest.raises(Refused, match="is an evaluation set, as its name says"):
        check_inputs(parse_sources([f"{tmp_path}/x/{source}"]))


def test_a_file_of_an_evaluation_is_found_behind_a_link_and_from_inside_of_its_folder(tmp_path, monkeypatch):
    touched(tmp_path / "gsm8k", "test.jsonl", "train.jsonl")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gsm8k" / "test.jsonl")
    monkeypatch.chdir(tmp_path / "gsm8k")
    for path in (str(tmp_path / "rows.jsonl"), "test.jsonl", "*.jsonl"):
        with pytest.raises(Refused, match="is an evaluation set"):
            check_inputs(parse_sources([path]))
    check_inputs(parse_sources(["train.jsonl"]))


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "openai/openai_humaneval",
            "TIGER-Lab/MMLU-Pro",
            "evalplus/humanevalplus",
            "my/theoremqa-rows",
            "x/aime_2024",
        ),
        *("HuggingFaceH4/MATH-500", "gorilla-llm/Berkeley-Function-Calling-Leaderboard", "data/MBPP.jsonl"),
        {"path": "google-research-datasets/mbpp", "split": "test"},
        {"path": "allenai/ai2_arc", "config": "ARC-Challenge", "split": "test"},
        {"path": "someone/benchmarks", "config": "gsm8k", "split": "test"},
    ],
)
def test_an_evaluation_is_found_inside_of_a_name(entry):
    with pytest.raises(Refused, match="is an evaluation set, as its name says"):
        parse_sources([entry])


@pytest.mark.parametrize(
    "name",
    [
        *("my-architecture/rows.jsonl", "my-architecture/test.jsonl", "research/test.jsonl", "march/test-0.jsonl"),
        *("gsm8k/train.jsonl", "test/gsm8k/train.jsonl", "gsm8k/latest.jsonl", "math-5000.jsonl", "math_50000/a.jsonl"),
        *("mmlu/auxiliary_train/a.jsonl", "mbpp/train.jsonl", "mbpp/full/train-0.jsonl", "aime_2019.jsonl"),
        *("my-mmlu-project/data/rows.jsonl", "aime_1983_2023.jsonl", "human_evaluations/rows.jsonl", "test/rows.jsonl"),
    ],
)
def test_other_names_are_no_evaluation(tmp_path, name):
    path = touched(tmp_path / "x", name) / name
    for source in (path, path.parent, f"{path.parent}/*"):
        check_inputs(parse_sources([str(source)]))


@pytest.mark.parametrize(
    "name", ["openai/gsm8k", "allenai/ai2_arc", "google-research-datasets/mbpp", "bfcl-team/songs"]
)
def test_training_splits_of_the_hub_are_no_evaluation(name):
    check_inputs(parse_sources([name]))


# Formats: what the first rows of every file tell.

TEXT, ALPACA = {"text": "A row."}, {"instruction": "Add 1 and 1.", "input": "", "output": "2"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]}
TOOLBENCH = {"id": "Step 1: x", **SHAREGPT}


def stage_of(folder: Path, source: object, **keys) -> Read:
    return Read(settings_of(folder / "out", [source], stages=["read"], **keys))


def read_all(folder: Path, source: object, **keys):
    return run(settings_of(folder / "out", [source], stages=["read"], **keys))["read"]


def test_rows_that_tell_two_formats_are_refused_with_both(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [ALPACA, TEXT])
    with pytest.raises(Refused, match="a.jsonl has rows of alpaca and text: give each a source of its own"):
        stage_of(tmp_path, source).check()
    with pytest.raises(Refused, match="has rows of sharegpt and toolbench"):
        stage_of(tmp_path, write_rows(tmp_path / "b.jsonl", [SHAREGPT, TOOLBENCH])).check()
    stage_of(tmp_path, {"path": str(source), "format": "alpaca"}).check()


def test_files_of_one_source_that_tell_two_formats_are_refused_at_the_plan_and_by_the_task(tmp_path):
    for number, row in enumerate([TEXT, TEXT, ALPACA]):
        write_rows(tmp_path / f"{number}.jsonl", [row] * 30)
    for start in (
        lambda: stage_of(tmp_path, f"{tmp_path}/*.jsonl").check(),
        lambda: read_all(tmp_path, f"{tmp_path}/*.jsonl"),
    ):
        with pytest.raises(Refused, match="has rows of alpaca and text"):
            start()


def test_an_evaluation_in_a_second_file_is_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"question": "x", "solution": "y"}])
    write_rows(tmp_path / "b.jsonl", [{"question": "x", "subject": "law", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(Refused, match="is the evaluation set MMLU"):
        stage_of(tmp_path, f"{tmp_path}/*.jsonl").check()


def test_the_format_is_told_by_the_first_row_that_can_be_read(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*range(25), ALPACA, *range(3), ALPACA])
    result = read_all(tmp_path, path)
    assert [row["messages"][0]["content"] for row in kept(result)] == ["Add 1 and 1."] * 2
    assert result.counts.dropped == {"not a JSON object": 28}


def test_a_file_without_a_readable_row_takes_the_format_of_its_source(tmp_path):
    write_rows(tmp_path / "a.jsonl", [ALPACA])
    write_rows(tmp_path / "b.jsonl", [1, 2])
    counts = read_all(tmp_path, f"{tmp_path}/*.jsonl").counts
    assert (counts.kept, counts.dropped) == (1, {"not a JSON object": 2})


# Rows of tables.


def nested(depth: int) -> object:
    return 1 if depth == 0 else [nested(depth - 1)]


def test_a_table_of_columns_that_are_nested_too_deeply_is_refused(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "more": [nested(150), None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(Refused, match="a.parquet .*too deeply nested"):
        read_all(tmp_path, tmp_path / "a.parquet")


def test_other_rows_of_a_table_are_given_around_one_that_cannot_be():
    notes: Counter[str] = Counter()
    rows = list(plain_rows([{"a": 1}, {"a": nested(150)}, {"a": float("nan")}], notes))
    assert rows == [{"a": 1}, Bad("nested too deeply"), {"a": None}] and notes.total() == 1


# Lives.


def test_blocks_that_a_killed_life_left_are_not_read_again(tmp_path):
    """A life that read 3,000 rows was killed before its counts; the next one, given 1,500, leaves two blocks."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"Row {n}."} for n in range(3000)])
    task = Task(Place(tmp_path, tmp_path / "stage", None), 0, 1, lambda count: None)
    for rows, blocks in ((None, 3), (1500, 2)):
        stage_of(tmp_path, {"path": str(path), "max_rows": rows}).format(task)
        assert len(list((task.place.work / "blocks").glob("*/*"))) == blocks


def test_another_standard_library_is_another_input_of_its_corpus(tmp_path):
    files = stage_of(tmp_path, "corpus/python-functions").files()
    assert Path(json.__file__) in files and not [file for file in files if "site-packages" in file.parts]
    assert stage_of(tmp_path, "corpus/kjv").files() == []


# Trees.


def node(name: str, role: str, *replies: object, **more) -> dict:
    empty = {"message_tree_id": None, "tree_state": None}  # as exports have them inside of a tree
    return {"message_id": name, "text": f"{name}.", "role": role, "replies": list(replies), **empty, **more}


def test_a_nested_tree_gives_the_paths_of_its_messages(tmp_path):
    below = node("c", "prompter", node("d", "assistant"))
    prompt = node("a", "prompter", node("b", "assistant", below, rank=1), node("e", "assistant", rank=0), 7)
    tree = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": prompt}
    result = read_all(tmp_path, write_rows(tmp_path / "a.jsonl", [tree]))
    paths = {" ".join(turn["content"] for turn in row["messages"]) for row in kept(result)}
    assert paths == {"a. b. c. d.", "a. e."}
    assert result.counts.dropped == {"inside of a path that is kept": 3, "bad_column:message_id": 1}


def test_a_tree_over_two_files_is_one_where_its_format_is_named_and_refused_where_not(tmp_path):
    rows = [{"message_id": "a", "parent_id": None, "text": "Hello", "role": "prompter", "message_tree_id": "t"}]
    write_rows(tmp_path / "0.jsonl", rows)
    write_rows(tmp_path / "1.jsonl", [rows[0] | {"message_id": "b", "parent_id": "a", "role": "assistant"}])
    with pytest.raises(Refused, match=r"belong together over its files: say {format: oasst}"):
        stage_of(tmp_path, f"{tmp_path}/*.jsonl").check()
    result = read_all(tmp_path, {"path": f"{tmp_path}/*.jsonl", "format": "oasst"})
    assert [len(row["messages"]) for row in kept(result)] == [2]
