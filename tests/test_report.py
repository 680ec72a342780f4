"""Which runs a page shows, what it calls them, and where its picture goes."""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path

import pandas
import pytest
import wandb
import yaml
from conftest import config_of

from rlt.reports.curves import curves
from rlt.reports.page import labelled, picture_of, runs_of, write_report
from rlt.reports.tables import configuration, evaluation
from rlt.runs.dashboard import log_figures
from trainers.outputs import weighted_sum

OWN = b"the run's own"


@pytest.fixture(scope="module")
def of_a_run() -> str:
    return yaml.safe_dump(config_of("evaluate_tiny"))


@pytest.fixture
def run(of_a_run):
    """Makes the folder of a run of two steps."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(of_a_run)
        lines = [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def pipeline(folder: Path, *names: str) -> Path:
    folder.mkdir()
    stages = [{"name": name, "run": "evaluate_tiny"} for name in names]
    of = {"trainer": "pipeline", "run_name": "pipeline_tiny", "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump({**of, "stages": stages}))
    return folder


def headings(page: Path) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page.read_text())


def test_a_label_is_the_shortest_tail_that_no_other_run_ends_in():
    folders = [Path(name) for name in ("/r/a/teacher", "/r/b/teacher", "/r/b/student", "/s/a/teacher", "/teacher")]
    assert list(labelled(folders)) == ["r/a/teacher", "b/teacher", "student", "s/a/teacher", "/teacher"]


@pytest.mark.parametrize("text", ["trainer: {max_epochs: 3}", "a: [", "- 1"])
def test_a_folder_of_another_program_holds_no_run(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="holds no run"):
        runs_of(tmp_path)


def test_a_run_that_is_named_twice_comes_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert labelled([Path("a"), Path("b/../a"), tmp_path / "a", Path()]) == {
        "a": tmp_path / "a",
        tmp_path.name: tmp_path,
    }


def test_runs_of_one_name_are_told_apart_in_title_headings_and_legend(run, tmp_path):
    folders = [run(tmp_path / place / "teacher") for place in ("a", "b")]
    page = tmp_path / "report.html"
    write_report(folders, page)
    assert "<title>a/teacher, b/teacher</title>" in page.read_text()
    assert "<h1>a/teacher, b/teacher</h1>" in page.read_text()
    assert headings(page) == ["a/teacher", "b/teacher"]
    axis = curves(labelled(folders)).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a/teacher", "b/teacher"]


def test_a_legend_keeps_names_that_begin_with_an_underscore(run, tmp_path):
    axis = curves({"_first": run(tmp_path / "_first"), "second": run(tmp_path / "second")}).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["_first", "second"]
    assert [line.get_xydata().tolist() for line in axis.get_lines()] == [[[1, 0], [2, 1]]] * 2


def test_a_pipelines_folder_shows_the_stages_that_have_begun_in_its_order(run, tmp_path):
    folder = pipeline(tmp_path / "pipeline", "warmup", "teacher", "after")
    with pytest.raises(ValueError, match="pipeline of which no stage has begun"):
        runs_of(folder)
    for name in ("teacher", "warmup"):
        run(folder / name)
    write_report([folder], tmp_path / "report.html")
    assert headings(tmp_path / "report.html") == ["warmup", "teacher"]
    assert "<h1>pipeline</h1>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("own", ["curves", "evaluation"])
def test_a_page_in_a_runs_folder_leaves_its_pictures_alone(run, own, tmp_path):
    folder = run(tmp_path / "run")
    (folder / f"{own}.png").write_bytes(OWN)
    write_report([folder], folder / f"{own}.html")
    assert (folder / f"{own}.png").read_bytes() == OWN
    assert (folder / f"{own}-report.png").read_bytes().startswith(b"\x89PNG")


def evaluated(folder: Path, accuracy: float, **more) -> Path:
    value = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    (folder / "evaluation.json").write_text(json.dumps({"questions": 2, "figures": {"pass@1": value}, **more}))
    answers = [("1 + 1?", "2", "It is <3>.", 0.0), ("1 + 2?", "3", "It is 3.", 1.0)]
    table = pandas.DataFrame(answers, columns=["question", "solution", "text", "right"])
    table.to_parquet(folder / "answers.parquet")
    return folder


def test_evaluations_and_keys_that_differ_stand_side_by_side(run, tmp_path):
    first, second = (evaluated(run(tmp_path / name), value) for name, value in (("a", 0.2), ("b", 0.5)))
    config = yaml.safe_load((second / "config.yaml").read_text())
    (second / "config.yaml").write_text(yaml.safe_dump({**config, "temperature": 0.1}))
    page = tmp_path / "report.html"
    write_report([first, second], page)
    text = page.read_text()
    assert "<td>pass@1</td><td>0.200 [0.100, 0.300]</td><td>0.500 [0.400, 0.600]</td>" in text
    assert "1 keys in which the 2 evaluate runs differ" in text
    assert f"<td>temperature</td><td>{config['temperature']}</td><td>0.1</td>" in text
    write_report([first], page)
    assert "in which the" not in page.read_text()


def test_the_difference_of_two_evaluations_stands_under_them(run, tmp_path):
    before = evaluated(run(tmp_path / "before"), 0.2)
    gain = {"mean": 0.3, "low": 0.1, "high": 0.5}
    after = evaluated(run(tmp_path / "after"), 0.5, difference=gain)
    config = yaml.safe_load((after / "config.yaml").read_text())
    (after / "config.yaml").write_text(yaml.safe_dump({**config, "compare_with": str(before)}))
    write_report([before, after], tmp_path / "report.html")
    cells = f"<td>difference, paired</td><td>—</td><td>+0.300 [+0.100, +0.500] against {before}</td>"
    assert cells in (tmp_path / "report.html").read_text()


def test_an_evaluation_shows_a_right_and_a_wrong_answer(run, tmp_path):
    text = evaluation(evaluated(run(tmp_path / "a"), 0.5))
    assert text.index("It is 3.") < text.index("It is &lt;3&gt;.")
    assert "<h3>right</h3>" in text and "<h3>wrong</h3>" in text


def test_a_run_is_compared_with_its_own_run_file(tmp_path):
    changed = config_of("collect_tiny", "traces_per_question=8", f"output_dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
    text = configuration(tmp_path)
    assert "2 differences from collect_tiny" in text
    assert "<td>traces_per_question</td><td>4</td><td>8</td>" in text


def test_each_of_several_reward_functions_has_a_panel(tmp_path):
    record = {"step": 1, "reward": 1.0, "rewards/answer_reward/mean": 0.5, "rewards/answer_reward/std": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record))
    assert [axis.get_title() for axis in curves({"run": tmp_path}).axes if axis.axison] == ["reward"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**record, "rewards/length_penalty/mean": -0.5}))
    titles = [axis.get_title() for axis in curves({"run": tmp_path}).axes if axis.axison]
    assert titles == ["reward", "answer reward", "length penalty"]


def test_several_rewards_are_one_by_their_weights():
    nan = float("nan")
    assert weighted_sum([[1.0, nan, nan], [4.0, 4.0, nan]], [2.0, 0.5])[:2] == [4.0, 2.0]
    assert math.isnan(weighted_sum([[1.0, nan, nan], [4.0, 4.0, nan]], [2.0, 0.5])[2])


def test_figures_of_jobs_become_a_wandb_run_where_that_is_asked_for(monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    log_figures(config_of("evaluate_tiny", "report_to=null"), {"evaluation/pass@1": 0.25})
    assert not list(tmp_path.iterdir())
    log_figures(config_of("evaluate_tiny", "report_to=wandb"), {"evaluation/pass@1": 0.25})
    wandb.teardown()  # its service writes the file behind the run's end
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"evaluation/pass@1" in file.read_bytes()


def test_a_picture_is_never_its_page():
    assert picture_of(Path("a/report.html")) == Path("a/report.png")
    assert picture_of(Path("a/report.png")) == Path("a/report-report.png")


def test_nothing_that_a_run_holds_becomes_a_part_of_the_page(run, tmp_path):
    """Names of files and figures are text, a browser runs nothing else, and what cannot be read is left out."""
    folder = run(tmp_path / "$x_{$ <i>run")
    mark = "<img src=x onerror=alert(1)>"
    (folder / "completions").mkdir()
    row = {"prompt": "p", "completion": "left \u202eright", "reward": 1.0}
    pandas.DataFrame([row] * 3).to_parquet(folder / "completions" / f"step-{mark}.parquet")
    (folder / "completions" / "step-z.parquet").write_bytes(b"PAR1")
    (folder / "answers.parquet").write_bytes(b"")
    figures = {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    result = {"questions": mark, "left_out": 0, "figures": figures, "accuracy": {}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "DATA_CARD.md").write_text("half \\ud800")
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert mark not in page and html.escape(mark) in page
    assert "left [U+202E]right" in page and "\u202e" not in page
    (allowed,) = re.findall("script-src 'sha256-(.*?)'", page)
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed
    assert (tmp_path / "report.png").stat().st_size > 0
