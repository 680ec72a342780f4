"""One HTML page of one or several runs, with nothing from outside, and its curves as a PNG beside it.

    python report.py OUTPUT_DIR... [--out=report.html]

Curves of rewards and their parts, KL, length, entropy, clipping, mismatch and seconds by phase; the best, median and
worst completions; evaluations; the configuration and where it differs from its run file. Several runs are set side by
side: their curves, evaluations, and the keys in which they differ. A pipeline's folder stands for those of its stages.
"""

import sys
from pathlib import Path

from rlt.errors import Refused, fail, usage
from rlt.reports.page import write_report

USAGE = "usage: python report.py OUTPUT_DIR... [--out=report.html]"


def main() -> None:
    named = [word for word in sys.argv[1:] if not word.startswith("--out=")]
    out = next((word.removeprefix("--out=") for word in sys.argv[1:] if word.startswith("--out=")), "report.html")
    if not named or any(word.startswith("-") for word in named):
        usage(USAGE)
    try:
        write_report([Path(name) for name in named], Path(out))
    except (Refused, OSError) as error:  # OSError: a place that cannot be written to
        fail(error)
    sys.stdout.write(f"{out}\n")
