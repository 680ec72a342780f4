"""Gates: what passes, fails, and cannot be decided."""

import json

import pytest
from conftest import launch

from rlt.commands.gates import decide, read_gates

RESULT = {"accuracy": 0.5, "difference": {"low": 0.01}, "broken": float("nan"), "endless": float("inf")}


def gates(tmp_path, text):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("metric", "direction", "threshold", "code"),
    [
        ("accuracy", "at_least", 0.5, 0),
        ("accuracy", "above", 0.5, 1),
        ("accuracy", "at_most", 0.5, 0),
        ("accuracy", "below", 0.5, 1),
        ("difference.low", "above", 0, 0),
        ("difference.high", "above", 0, 1),  # missing
        ("broken", "at_most", 1e9, 1),  # not a number
        ("endless", "above", 0, 1),
        ("accuracy", "above", "1e-3", 0),  # text to YAML 1.1, which wants 1.0e-3
        ("difference", "above", 0, 1),  # not a number either
    ],
)
def test_a_gate_is_a_metric_a_direction_and_a_threshold(metric, direction, threshold, code, tmp_path):
    text = f"- {{metric: {metric}, direction: {direction}, threshold: {threshold}}}"
    assert decide(read_gates(gates(tmp_path, text)), RESULT)[0] == code


def test_a_direction_that_is_a_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is none of above, at_least"):
        read_gates(gates(tmp_path, "- {metric: accuracy, direction: [above], threshold: 0}"))


def test_one_that_fails_fails_all_and_each_value_stands_beside_its_threshold(tmp_path):
    text = """
- {metric: accuracy, direction: at_least, threshold: 0.4}
- {metric: difference.low, direction: above, threshold: 0.02}
"""
    code, report = decide(read_gates(gates(tmp_path, text)), RESULT)
    assert code == 1
    assert report.splitlines()[0].split() == ["pass", "accuracy", "0.5", "at", "least", "0.4"]
    assert report.splitlines()[1].split() == ["FAIL", "difference.low", "0.01", "above", "0.02"]


def test_no_gate_is_a_failure(tmp_path):
    assert decide(read_gates(gates(tmp_path, "")), RESULT)[0] == 1


@pytest.mark.parametrize(
    ("text", "result", "code", "said"),
    [
        ("- {metric: a, direction: at_least, threshold: 1}", {"a": 2}, 0, "pass"),
        ("- {metric: a, direction: at_least, threshold: 3}", {"a": 2}, 1, "FAIL"),
        ("- {metric: a, direction: over, threshold: 3}", {"a": 2}, 2, "direction='over' is none of"),
        ("- {metric: a, threshold: 3}", {"a": 2}, 2, "must have metric, direction and threshold"),
        ("- {metric: a, direction: above, threshold: high}", {"a": 2}, 2, "threshold='high' is not a number"),
        ("- {metric: a, direction: above, threshold: 1}", None, 2, "cannot be read"),
    ],
)
def test_exit_codes(text, result, code, said, tmp_path):
    path = tmp_path / "result.json"
    if result is not None:
        path.write_text(json.dumps(result))
    done = launch("gates.py", str(gates(tmp_path, text)), str(path))
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_the_shipped_gates_can_be_read():
    from conftest import ROOT

    paths = sorted((ROOT / "cfgs/gates").glob("*.yaml"))
    assert paths and all(read_gates(path) for path in paths)
