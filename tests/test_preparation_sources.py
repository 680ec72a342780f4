"""What a source is, by its names, by the first rows of all its files, and by the version that is read."""

from pathlib import Path

import pytest

from rlt.errors import Refused
from rlt.formats.inputs import check_inputs, parse_sources


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
