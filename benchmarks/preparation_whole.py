"""How long a mixed corpus takes through every stage, and a second time with nothing left to do:

    .venv/bin/python benchmarks/preparation_whole.py --megabytes 100 --out whole.json

Half of the bytes are text (Bibles by chapter, sources of the installed packages), half are conversations (word problems
with worked steps of reasoning-gym, documented functions with their bodies). All cores are used.
"""

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from rlt.data.generator import generated_rows
from rlt.data.worked import WRITERS
from rlt.formats.corpora import function_rows

ROOT = Path(__file__).resolve().parent.parent
# Without write, which keeps rows of one form: this corpus has two.
STAGES = "read,clean,language,quality,pii,toxicity,exact,near,decontamination,split,tokens,pack"
VERSIONS = ("kjv", "akjv", "asv", "web")
VERSES = 25  # of a document
PROBLEMS = 500  # of a task and seed
LIMIT_S = 3600

Row = dict[str, Any]


def chapters() -> Iterator[Row]:
    for version in VERSIONS:
        verses = import_module(f"pythonbible_{version}.plain_text_readers_bible").bible.scripture_content.split("\n")
        for first in range(0, len(verses), VERSES):
            yield {"text": "\n".join(verses[first : first + VERSES])}


def sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def files() -> Iterator[Row]:
    for source in sources():
        if source.strip():
            yield {"text": source}


def problems() -> Iterator[Row]:
    for seed in count():
        for task in WRITERS:
            for row in generated_rows(task, seed, PROBLEMS):
                if row["reasoning_trace"]:
                    yield {key: row[key] for key in ("question", "solution", "reasoning_trace")}


def functions() -> Iterator[Row]:
    """A signature with its documentation, and the body."""
    for source in sources():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield from function_rows(node, lines, "")


def write(path: Path, rows: Iterator[Row], size: float) -> float:
    """The first rows of at most `size` bytes; how many bytes there are."""
    written = 0
    with path.open("wb") as file:
        for row in rows:
            if written >= size:
                break
            written += file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    return written


def corpus(folder: Path, size: float) -> tuple[list[str], float]:
    """The run's sources, and their bytes."""
    bibles = write(folder / "bibles.jsonl", chapters(), size / 2)
    code = write(folder / "sources.jsonl", files(), size / 2 - bibles)
    worked = write(folder / "problems.jsonl", problems(), size / 4)
    bodies = write(folder / "functions.jsonl", functions(), size / 4)
    kinds = {"bibles": ("text", "prose"), "sources": ("text", "code")}
    kinds |= {"problems": ("prompt-answer", "maths"), "functions": ("harmony_completion", "code")}
    entries = [
        f"{{path: {folder / name}.jsonl, name: {name}, format: {format}, kind: {kind}}}"
        for name, (format, kind) in kinds.items()
    ]
    return entries, bibles + code + worked + bodies


def run(entries: list[str], output: Path) -> float:
    """Seconds of a preparation in a process of its own."""
    command = [sys.executable, str(ROOT / "prepare.py"), "prepare_rlt", f"sources=[{','.join(entries)}]"]
    command += [f"output_dir={output}", f"stages=[{STAGES}]", "allow_empty_sources=true", "near_alarm_share=1"]
    command += ["tokenizer=embedded/smollm2-135m-instruct", "validation_share=0.01"]
    begin = time.monotonic()
    subprocess.run(command, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - begin, 1)


def counts(output: Path) -> dict[str, Any]:
    """Rows of each stage, and the seconds from the stage before."""
    found = {}
    for stats in sorted((output / "stages").glob("*/stats.json")):
        read = json.loads(stats.read_text(encoding="utf-8"))
        found[stats.parent.name] = {key: read[key] for key in ("in", "kept", "dropped", "seconds") if key in read}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entries, size = corpus(Path(folder), arguments.megabytes * 1e6)
        output = Path(folder) / "out"
        found: dict[str, Any] = {"megabytes": round(size / 1e6, 1), "seconds": run(entries, output)}
        found |= {"stages": counts(output), "seconds of a second run": run(entries, output)}
    arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
