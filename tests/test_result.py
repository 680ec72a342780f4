"""The sentence that a run prints is the one on its page; pages need no torch; doors without an argument say how."""

import json
import subprocess
import sys

import pandas
import pytest
import yaml
from conftest import ROOT, RUN_TIMEOUT_S, config_of, launch

from rlt.estimates import Estimate
from rlt.reports.page import write_report
from rlt.reports.result import Result, held_out_result, interval, kept, result_of
from trainers.outputs import places_of_step

NAN = float("nan")
RECORDS = [
    {"step": 0, "reward": [-2.0, -4.0, NAN], "length": [10.0, 20.0, 30.0]},
    {"step": 2, "reward": [-1.0, -1.0, NAN], "length": [10.0, 20.0, 31.0]},
    {"step": 4, "reward": [-1.0, -2.0, 0.5], "length": [12.0, 22.0, 32.0]},
]
TINY_STEPS = ("max_steps=3", "eval_steps=1", "save_steps=1", "save_completions_probability=1.0")


@pytest.fixture(scope="module")
def tiny(tiny_run, tmp_path_factory):
    """The folder of a real run that keeps its best weights and generates for two steps at once, and what it said."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    more = ("load_best_model_at_end=true", "generation_aggregation_steps=4", f"output_dir={folder}")
    done = launch("train.py", *tiny_run, *TINY_STEPS, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_a_sentence_has_means_of_the_scored_and_a_paired_difference():
    result = held_out_result(RECORDS, 4)
    # Questions gained 1 and 2; the third had no reward before. Resampled means of two are 1, 1.5 or 2.
    assert result.estimate == Estimate(1.5, 1.0, 2.0)
    assert result.sentence == (
        "reward on 3 held-out questions x 4: -3.000 -> -0.833, paired difference +1.500 [+1.000, +2.000] "
        "(95 % bootstrap); length 20 -> 22 tokens"
    )
    assert held_out_result(RECORDS[:1], 4) is None


@pytest.mark.parametrize(
    ("best", "step"),
    [(None, 4), (("reward", True), 4), (("reward", False), 2), (("length", True), 4), (("length", False), 2)],
)
def test_the_kept_evaluation_is_the_last_or_the_best_after_the_start(best, step):
    assert kept(RECORDS, best)["step"] == step


def test_of_equal_evaluations_the_first_is_kept_and_one_without_a_number_never():
    records = [{"step": step, "reward": [value]} for step, value in ((0, 9.0), (1, NAN), (2, 1.0), (3, 1.0))]
    assert kept(records, ("reward", True))["step"] == 2
    assert kept(records[:2], ("reward", True))["step"] == 1  # nothing to choose from


def test_the_sentence_on_the_page_is_the_printed_one(tiny, tmp_path):
    folder, said = tiny
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("reward on 2 held-out questions x 2: ")
    assert "chosen on these questions from 3 evaluations" in sentence
    assert result_of(folder).sentence == sentence
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.index(sentence.replace(">", "&gt;")) < page.index("<img")
    assert f'aria-label="95 % interval: {result_of(folder).estimate.signed}"' in page


def test_each_completion_has_its_own_question_and_solution_and_each_step_its_own_completions(tiny):
    folder, _ = tiny
    frames = [pandas.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]
    assert [frame["step"].unique().tolist() for frame in frames] == [[1], [2], [3]]
    table = pandas.concat(frames)
    assert len(table) == 24 and not table.duplicated(["prompt", "completion"]).any()
    for row in table.to_dict("records"):
        assert row["question"] in row["prompt"]
        assert f"<|begin_of_solution|>{row['solution']}<|end_of_solution|>" in row["prompt"]
    assert table.groupby("step")["question"].nunique().tolist() == [2, 2, 2]  # 8 completions, 4 of each


def test_completions_of_several_generations_of_a_step_are_all_written(tiny_run, tmp_path):
    more = ("max_steps=1", "eval_size=0", "save_completions_probability=1.0", "generation_aggregation_steps=1")
    done = launch("train.py", *tiny_run, *more, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "step-00001.parquet")
    assert len(table) == 8 and table["question"].nunique() == 2
    assert all(row["question"] in row["prompt"] for row in table.to_dict("records"))


def test_places_of_a_step_among_what_was_generated_for_two():
    # Two ranks with four micro-batches of one completion each, generated together; two of them make a step.
    assert places_of_step(1, 2, 4, 2, 8) == [0, 1, 4, 5]
    assert places_of_step(2, 2, 4, 2, 8) == [2, 3, 6, 7]
    assert places_of_step(3, 2, 4, 2, 8) == [0, 1, 4, 5]  # the next generation
    assert places_of_step(5, 4, 4, 2, 8) == list(range(8))
    assert places_of_step(5, 4, 2, 2, 8) == list(range(8))


def evaluation_folder(folder, **difference):
    folder.mkdir()
    settings = config_of("evaluate_tiny", f"output_dir={folder}", "model_name_or_path=a/model")
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "compare_with": "before"}))
    figures = {"average@4": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    (folder / "evaluation.json").write_text(json.dumps({"questions": 8, "figures": figures, **difference}))
    return folder


def test_an_evaluations_sentence_is_its_first_figure_or_its_difference(tmp_path):
    alone = result_of(evaluation_folder(tmp_path / "alone"))
    assert alone.sentence.startswith("a/model on 8 questions of ")
    assert alone.sentence.endswith(": average@4 0.500 [0.250, 0.750]") and not alone.zero_matters
    gain = {"difference": {"mean": 0.2, "low": -0.1, "high": 0.5}, "compared": 7}
    compared = result_of(evaluation_folder(tmp_path / "compared", **gain))
    assert compared.sentence.endswith("; against before: +0.200 [-0.100, +0.500], paired over 7 questions")
    assert compared.estimate == Estimate(0.2, -0.1, 0.5) and compared.zero_matters


def test_an_interval_is_drawn_to_scale():
    drawn = interval(Result("", Estimate(0.5, 0.0, 1.0)))  # over 320 pixels with 8 at each side
    assert 'class=range x1="8.0" x2="312.0"' in drawn and 'circle cx="160.0"' in drawn
    drawn = interval(Result("", Estimate(-0.5, -1.0, -0.25), zero_matters=True))
    assert 'class=zero x1="312.0"' in drawn and 'class=range x1="8.0" x2="236.0"' in drawn
    assert interval(Result("", Estimate(NAN, NAN, NAN))) == interval(Result("")) == ""


def test_a_reader_of_reports_needs_no_torch(tiny, tmp_path):
    page = tmp_path / "report.html"
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['trl'] = None  # an import of these fails\n"
        "from rlt.commands.report import main\n"
        f"sys.argv[1:] = [{str(tiny[0])!r}, '--out={page}']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"{page}\n"), done.stderr
    assert "all completions: 24 completions of 3 files" in page.read_text()


def test_importing_the_method_from_rewards_stays_as_it_was():
    from rlt.rewards import NORMALIZERS, REDUCTIONS, Reading, Scored, TeacherReward

    assert all((NORMALIZERS, REDUCTIONS, Reading, Scored, TeacherReward))


@pytest.mark.parametrize("door", ["report.py", "score.py", "gates.py"])
def test_a_door_without_an_argument_prints_its_usage_and_exits_2(door):
    done = launch(door)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: python {door} ")
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_a_word_that_no_report_knows_is_answered_with_the_usage():
    done = launch("report.py", "--output=x.html", "results/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python report.py OUTPUT_DIR... [--out=report.html]\n"
