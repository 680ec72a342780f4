"""Checks and times what a GPU does differently, in under nine minutes; without network, vLLM or a model's files.

    scripts/gpu_check.sh OUT [--device cpu] [--parts attention head ...]

Models have random weights in the shapes of Qwen3-0.6B and 1.7B and Qwen2.5-7B, on the CPU in tiny ones (sizes.py).
Every part is a process of its own with a limit. OUT/results.json holds what each has measured and is written anew after
each part, OUT/log.txt what they said. The exit code is 1 when a part failed, and the table is printed at the end.
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runner import run_parts
from benchmarks.gpu_check.sizes import SIZES
from benchmarks.gpu_check.table import table


def run_here(name: str, out: Path, device: str) -> None:
    """One part, in this process; OUT is the file of its figures."""
    part = importlib.import_module(f"benchmarks.gpu_check.parts.{PARTS[name].module}")
    record = Record(out, device)
    part.run(record, SIZES[device], device)
    record.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these, in this order"
    )
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_here(args.part, args.out, args.device)
        return
    results = run_parts(args.parts, args.out, args.device)
    sys.stdout.write(table(results) + "\n")
    sys.exit(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    main()
