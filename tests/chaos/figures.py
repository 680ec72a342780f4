"""The chaos suite's figures: `./run_tests.sh -m slow tests/chaos`, then `python tests/chaos/figures.py` for its table.

Each test records what it measured in results/chaos.json, by the row of the table in docs/reliability.md.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "results" / "chaos.json"


def record(row: str, **figures: float | str) -> None:
    """Keep the figures of a row, beside those of its other tests."""
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    found[row] = found.get(row, {}) | figures
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(found, indent=1))


def table() -> str:
    """All that was recorded, as Markdown."""
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    lines = ["| accident | measured |", "|---|---|"]
    for row, figures in found.items():
        said = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        lines.append(f"| {row} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
