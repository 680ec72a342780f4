"""The pages are true: commands run as they are written, and every path, run, key, module and link is there.

A ```bash block is run; a ```sh block needs more devices than a test has and is planned (`dry_run=true`); a ```console
block needs other machines. A ```text block behind a command shows its output: its numbers are compared in a dry run.
"""

import importlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from itertools import repeat
from pathlib import Path

import pytest
from conftest import ROOT

from rlt.commands import serve
from rlt.commands.score import ScoreSettings
from rlt.launching.environment import SHARDINGS
from rlt.places import CFGS
from rlt.planning.checks import key_names
from rlt.runs import folder
from rlt.schema import own_keys

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?")
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
SETTING = re.compile(r"^[+]*([a-z][a-z0-9_]*)=")
OF_RECIPES = {"base_url", "largest", "steps", "questions", "samples", "max_tokens", "held_out", "folder", "name"}
OF_CLIENTS = {"merged", "loss_fn"}
OF_SCORE = own_keys(ScoreSettings).keys()
TREE = re.compile(
    r"^(?:rlt|trainers|backends|cfgs|docs|tests|benchmarks|recipes|scripts|accelerate_configs|\.github)/[\w./-]*$"
)
FILE = re.compile(r"^[\w-]+\.(?:py|sh|md|ipynb|toml|cff|txt)$")
TUTORIAL_LIMIT_S, README_LIMIT_S, PLAN_LIMIT_S = 3600, 3 * 3600, 120
ANY = math.inf  # a number stands for any: runs in bfloat16 give others on another processor


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return BLOCK.findall(text_of(page))


def shown_after(page: str) -> list[tuple[str, str, str]]:
    """(language, commands, output shown) of the blocks with commands; the output is empty where none is shown."""
    found = blocks(page)
    pairs = zip(found, [*found, ("", "")][1:], strict=True)
    return [
        (language, commands, following if kind == "text" else "")
        for (language, commands), (kind, following) in pairs
        if language in ("bash", "sh", "console")
    ]


def logical_lines(commands: str) -> list[str]:
    """Lines with their continuations; a here-document belongs to none."""
    commands = re.sub(r"<<'END'.*?^END$", "", commands, flags=re.MULTILINE | re.DOTALL)
    return [line for line in commands.replace("\\\n", " ").splitlines() if line.strip()]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def missing_lines(shown: str, output: str, within: float) -> list[str]:
    """Lines that are shown and do not stand in the output, in that order; numbers may be off by a share of `within`."""
    lines, missing, place = output.splitlines(), [], 0
    for line in filter(str.strip, shown.splitlines()):
        found = next((n for n in range(place, len(lines)) if is_shown(line, lines[n], within)), None)
        if found is None:
            missing.append(line)
        else:
            place = found + 1
    return missing


def is_shown(shown: str, printed: str, within: float) -> bool:
    """Whether a line, or a part of it, is the one that a page shows."""
    pieces = map(squeezed, NUMBER.split(shown))
    pattern = r"([-+−]?[\d,.na]+)".join(r"\s+".join(map(re.escape, piece.split(" "))) for piece in pieces)
    found = re.search(pattern, squeezed(printed))
    if found is None or within == ANY:
        return found is not None
    return all(map(is_near, NUMBER.findall(shown), found.groups(), repeat(within)))


def is_near(shown: str, printed: str, within: float) -> bool:
    """Whether a number is the one shown, or a share off at most; a sign of no number ("n/a") is itself alone."""
    try:
        a, b = (float(number.replace(",", "").replace("−", "-")) for number in (shown, printed))
    except ValueError:
        return shown == printed
    return math.isclose(a, b, rel_tol=within, abs_tol=within)


def squeezed(line: str) -> str:
    return re.sub(r" +", " ", line)


def shell(commands: str, folder: Path, limit_s: int) -> subprocess.CompletedProcess:
    """bash runs the commands up to the first that fails; none of their processes outlives the limit."""
    started = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", commands],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = started.communicate(timeout=limit_s)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(commands, started.returncode, said, complained)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A copy of the project with this environment, so that files of the pages' commands stand nowhere else.

    Its setup.sh does nothing: the environment is made already, and would be made anew for another folder.
    """
    unwanted = shutil.ignore_patterns(".git", ".venv", ".venv.lock", "results", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=unwanted)
    (tmp_path / "clone" / ".venv").symlink_to((ROOT / ".venv").resolve())
    (tmp_path / "clone" / "setup.sh").write_text("#!/usr/bin/env bash\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "clone"))
    return tmp_path / "clone"


def run_page(page: str, clone: Path, limit_s: int, within: float = ANY) -> None:
    """Run a page's ```bash blocks in their order, each as it is written, and compare what they print."""
    for language, commands, shown in shown_after(page):
        if language != "bash":
            continue
        done = shell(commands, clone, limit_s)
        assert done.returncode == 0, f"{page}: {commands}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        missing = missing_lines(shown, done.stdout, 0 if "dry_run=true" in commands else within)
        assert not missing, f"{page}: {commands}\nshown and not printed: {missing}\n{done.stdout[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(TUTORIAL_LIMIT_S)
def test_the_tutorial_runs_as_it_is_written(clone):
    run_page("docs/tutorial.md", clone, TUTORIAL_LIMIT_S)


@pytest.mark.slow
@pytest.mark.timeout(TUTORIAL_LIMIT_S)
def test_the_page_of_the_training_api_runs_as_it_is_written(clone):
    run_page("docs/training_api.md", clone, TUTORIAL_LIMIT_S, within=0.01)  # float32 on one machine, seeded


@pytest.mark.slow
@pytest.mark.timeout(README_LIMIT_S)
def test_the_readme_runs_as_it_is_written(clone):
    run_page("README.md", clone, README_LIMIT_S)


@pytest.mark.slow
@pytest.mark.timeout(TUTORIAL_LIMIT_S)
def test_the_notebook_runs(clone):
    import nbclient
    import nbformat

    notebook = nbformat.read(clone / "docs" / "first_run.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=TUTORIAL_LIMIT_S, resources={"metadata": {"path": clone / "docs"}}
    )
    client.execute()
    assert all(cell["execution_count"] for cell in notebook.cells if cell.cell_type == "code")


PLANNED = [
    (page, line, shown)
    for page in ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
    for language, commands, shown in shown_after(page)
    if language == "sh"
    for line in logical_lines(commands)
]


@pytest.mark.parametrize("page, line, shown", PLANNED, ids=[line.split("#")[0].strip() for _, line, _ in PLANNED])
def test_a_command_for_more_devices_is_planned(page, line, shown, clone):
    planned = f"{line.split(' #')[0]} dry_run=true"
    done = shell(planned, clone, PLAN_LIMIT_S)
    assert done.returncode == 0, f"{page}: {planned}\n{done.stderr[-2000:]}"
    assert missing_lines(shown, done.stdout, within=0) == []


def commands_of(page: str) -> list[list[str]]:
    """The words of every command that a page shows, in blocks and between words."""
    lines = [line for _, commands, _ in shown_after(page) for line in logical_lines(commands)]
    inline = [text for text in INLINE.findall(text_of(page)) if text.startswith(("./", "torchrun", "NNODES", ".venv/"))]
    return [words(line) for line in lines] + [words(line) for line in inline]


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_is_a_key(page):
    groups = {path.name for path in CFGS.iterdir() if path.is_dir()} | {"reward_cfg"}
    known = key_names() | groups | OF_SCORE | set(serve.USAGE) | OF_RECIPES | OF_CLIENTS
    named = {word for command in commands_of(page) for word in command}
    named |= {word for text in INLINE.findall(text_of(page)) for word in text.split()}
    settings = {match.group(1) for word in named if (match := SETTING.match(word))}
    assert settings <= known, sorted(settings - known)


def run_named(command: list[str]) -> str | None:
    """The run that a command of ours starts; None where it names none."""
    door = next((n for n, word in enumerate(command) if word in DEVICES_BEFORE_RUN), None)
    if door is None:
        return None
    rest = command[door + 1 + DEVICES_BEFORE_RUN[command[door]] :]
    rest = [word for word in rest if "=" not in word and not word.startswith("-") and word not in SHARDINGS]
    return rest[0] if rest else None


DEVICES_BEFORE_RUN = {
    "./launch_mono.sh": 0,
    "./launch.sh": 1,
    "./launch_with_server.sh": 2,
    "train.py": 0,
    "scripts/slurm.sbatch": 0,
}
RUNS = {path.stem for path in (CFGS / "run_cfg").glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES)
def test_every_run_that_a_page_starts_is_a_run_file(page):
    named = {run for command in commands_of(page) if (run := run_named(command))}
    placeholders = {"RUN", "[RUN]"}
    assert named <= RUNS | placeholders, sorted(named - RUNS)


def test_the_readmes_table_has_every_run():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+)[^|]*\|", text_of("README.md"), re.MULTILINE)
    assert {name for row in rows for name in INLINE.findall(row)} == RUNS


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page):
    tokens = {word.strip(".,;:()") for text in INLINE.findall(text_of(page)) for word in text.split()}
    tokens |= {
        word.strip(".,;:()") for line in text_of(page).splitlines() if line.startswith("    ") for word in line.split()
    }
    tokens |= {word for command in commands_of(page) for word in command}
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    gone = {t for t in tokens if TREE.match(t) and not (ROOT / t).exists()}
    gone |= {
        t for t in tokens if FILE.match(t) and t not in names and t not in vars(folder).values() and t != "shortness.py"
    }
    assert not gone, sorted(gone)


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_names_can_be_imported(page):
    for module, names in re.findall(r"from ((?:rlt|trainers|backends)[\w.]*) import ([\w, ]+)", text_of(page)):
        found = importlib.import_module(module)
        assert all(hasattr(found, name.strip()) for name in names.split(",")), f"{module}: {names}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    without_blocks = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", without_blocks, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_resolves(page):
    for target in LINK.findall(text_of(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target} has no such heading"


def test_the_internals_name_everything_that_a_run_leaves():
    names = {value for name, value in vars(folder).items() if name.isupper() and isinstance(value, str)}
    page = text_of("docs/internals.md")
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_internals_give_the_rooms_in_the_order_that_is_kept():
    from test_rooms import ORDER

    table = text_of("docs/internals.md").partition("| room |")[2].partition("\n\n")[0]
    named = [name.removesuffix(".py").replace("/", ".") for row in table.splitlines() for name in first_cell(row)]
    assert [room for room in named if room in ORDER] == [room for room in ORDER if room_exists(room)]


def first_cell(row: str) -> list[str]:
    return INLINE.findall(row.split("|")[1]) if row.count("|") > 2 else []


def room_exists(room: str) -> bool:
    place = ROOT / room.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def test_the_readme_is_a_page_that_is_read_to_the_end():
    assert len(text_of("README.md").splitlines()) <= 160


def test_the_notebook_shows_what_it_printed_and_no_place_of_the_machine_that_ran_it():
    text = text_of("docs/first_run.ipynb")
    assert '"execution_count": null' not in text
    assert '"stderr"' not in text and str(ROOT) not in text and "/tmp/" not in text


def test_shown_numbers_stand_for_any_and_words_for_themselves():
    shown = "reward -9.823 -> -9.204, format rate 95%\n4 kept"
    assert missing_lines(shown, "first\nreward -1.0 -> +12, format rate 3%\n57 kept", within=ANY) == []
    assert missing_lines(shown, "reward -1.0 -> +12, format rate 3%", within=ANY) == ["4 kept"]
    assert missing_lines(shown, "4 kept\nreward -1.0 -> +12, format rate 3%", within=ANY) == [
        "4 kept"
    ]  # in their order
    assert missing_lines("rows 1024", "rows   1024", within=0) == []
    assert missing_lines("rows 1024", "rows 512", within=0) == ["rows 1024"]
    assert missing_lines("loss 42.38, at 1e-05", "loss 42.37, at 1e-05", within=0.01) == []
    assert missing_lines("loss 46.5 norm 1.0", "loss 42.379 norm 308.89", within=0.01) == ["loss 46.5 norm 1.0"]
