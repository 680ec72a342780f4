"""Is a result good enough: `python gates.py cfgs/gates/student.yaml results/evaluate_tiny/evaluation.json`.

A gate file is a list of `metric` (a dotted path into the JSON file), `direction` (above, at_least, below, at_most) and
`threshold`. Exit code 0: all hold; 1: one does not, is missing or not a number, or there is none; 2: not decidable,
because a file cannot be read.
"""

import json
import math
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlt.errors import Refused, usage

DIRECTIONS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}
PASS, FAIL, UNDECIDABLE = 0, 1, 2
USAGE = "usage: python gates.py GATES.yaml RESULT.json"


@dataclass(frozen=True)
class Gate:
    """`metric` has to be `direction` `threshold`."""

    metric: str
    direction: str
    threshold: float

    def holds(self, value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and DIRECTIONS[self.direction](value, self.threshold)


def read_gates(path: Path) -> list[Gate]:
    """The gates of a file.

    Raises:
        Refused: the file cannot be read, or an entry is no gate.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read: {error}") from None
    if not isinstance(entries, list):
        raise Refused(f"{path} must hold a list of gates")
    return [_gate(entry, f"{path} gate {number}") for number, entry in enumerate(entries, start=1)]


def _gate(entry: Any, place: str) -> Gate:
    if not isinstance(entry, dict) or set(entry) != {"metric", "direction", "threshold"}:
        raise Refused(f"{place} must have metric, direction and threshold, and nothing else")
    if not isinstance(entry["direction"], str) or entry["direction"] not in DIRECTIONS:
        raise Refused(f"{place}: direction={entry['direction']!r} is none of {', '.join(DIRECTIONS)}")
    return Gate(str(entry["metric"]), entry["direction"], _number(entry["threshold"], place))


def _number(threshold: Any, place: str) -> float:
    """Also of `1e-3`, which YAML 1.1 takes for text."""
    try:
        number = math.nan if isinstance(threshold, bool) else float(threshold)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Refused(f"{place}: threshold={threshold!r} is not a number")
    return number


def value_of(result: dict, metric: str) -> Any:
    """By its dotted path; None where there is nothing."""
    found: Any = result
    for key in metric.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def decide(gates: list[Gate], result: dict) -> tuple[int, str]:
    """The exit code, and each value beside its threshold."""
    lines, code = [], PASS if gates else FAIL
    for gate in gates:
        value = value_of(result, gate.metric)
        held = gate.holds(value)
        code = code if held else FAIL
        shown = f"{value:.4g}" if isinstance(value, (int, float)) else "missing" if value is None else repr(value)
        wanted = f"{gate.direction.replace('_', ' ')} {gate.threshold:g}"
        lines.append(f"{'pass' if held else 'FAIL'}  {gate.metric:<32} {shown:>10}  {wanted}")
    return code, "\n".join(lines or ["FAIL  the gate file is empty"])


def main() -> None:
    if len(sys.argv) != 3:
        usage(USAGE)
    gates_file, result_file = map(Path, sys.argv[1:])
    try:
        gates = read_gates(gates_file)
        try:
            result = json.loads(result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(f"{result_file} cannot be read: {error}") from None
    except Refused as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(UNDECIDABLE)
    code, report = decide(gates, result)
    sys.stdout.write(f"{report}\n")
    sys.exit(code)
