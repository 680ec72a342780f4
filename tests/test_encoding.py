"""Text is UTF-8 in files and between processes, whatever the locale says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, config_of

PLACES = ("rlt", "trainers", "backends", "recipes", "scripts")
TEXT = {"read_text", "write_text"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for place in PLACES for path in (ROOT / place).rglob("*.py"))]


def leaves_it_to_the_locale(call: ast.Call) -> bool:
    """A text file that is opened, or a process whose words are read as text, without an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {word.arg: word.value for word in call.keywords}
    if "encoding" in given:
        return False
    if name == "open":
        if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("os", "gzip"):
            return False  # bytes
        named = given.get("mode", next(iter(call.args[isinstance(call.func, ast.Name) :]), None))
        return "b" not in str(named.value if isinstance(named, ast.Constant) else "")
    return name in TEXT or "text" in given and name in ("Popen", "run", "check_output")


def test_every_text_that_is_read_or_written_has_its_encoding():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and leaves_it_to_the_locale(node)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("path.open()", True),
        ("open(path)", True),
        ('open(path, "a")', True),
        ('path.open("w", encoding="utf-8")', False),
        ('path.open("rb")', False),
        ('open(path, "rb")', False),
        ("path.read_text()", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_what_leaves_it_to_the_locale_is_seen(line, expected):
    assert leaves_it_to_the_locale(ast.parse(line).body[0].value) is expected


def test_a_report_of_a_run_with_other_letters_is_made_in_an_ascii_locale(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config_of("evaluate_tiny")), encoding="utf-8")
    (run / "DATA_CARD.md").write_text("Zürich, 三, 10−7", encoding="utf-8")
    page = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, str(ROOT / "report.py"), str(run), f"--out={page}"],
        env={**os.environ, **ASCII, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert "Zürich, 三, 10−7" in page.read_text(encoding="utf-8")
