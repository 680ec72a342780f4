"""Which runs a page shows, what it calls them, and where its picture goes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import config_of

from report import labelled, picture_of, runs_of, write_report
from reports.curves import curves

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
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": "pipeline", "stages": stages}))
    return folder


def headings(page: Path) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page.read_text())


def test_a_label_is_the_shortest_tail_that_no_other_run_ends_in():
    folders = [Path(name) for name in ("/r/a/teacher", "/r/b/teacher", "/r/b/student", "/s/a/teacher", "/teacher")]
    assert list(labelled(folders)) == ["r/a/teacher", "b/teacher", "student", "s/a/teacher", "/teacher"]


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
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("own", ["curves", "evaluation"])
def test_a_page_in_a_runs_folder_leaves_its_pictures_alone(run, own, tmp_path):
    folder = run(tmp_path / "run")
    (folder / f"{own}.png").write_bytes(OWN)
    write_report([folder], folder / f"{own}.html")
    assert (folder / f"{own}.png").read_bytes() == OWN
    assert (folder / f"{own}-report.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_never_its_page():
    assert picture_of(Path("a/report.html")) == Path("a/report.png")
    assert picture_of(Path("a/report.png")) == Path("a/report-report.png")
