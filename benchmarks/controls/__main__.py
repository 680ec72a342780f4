"""Does the reward matter, does reinforcement learning, or is it a filter? Students of equal trained tokens, by arm.

    .venv/bin/python benchmarks/controls --out DIR                        every arm and seed of the plan (PLAN.md)
    .venv/bin/python benchmarks/controls --out DIR --arms rl warm-up --seeds 0 1
    .venv/bin/python benchmarks/controls --tables                         tables and a figure of what is there

A result of an arm and a seed is a small file below benchmarks/controls/results, committed as it comes: the same command
goes on where it was stopped, on another machine too. DIR holds models and explanations of the seed at work.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import records
import settings
import tables
from arms import ARMS, KNOWN, TRIED, seeds_of

from rlt.errors import Refused, fail
from rlt.places import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="of runs; gigabytes while a seed is at work")
    parser.add_argument("--arms", nargs="+", choices=list(KNOWN), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="those of the plan, if none are named")
    parser.add_argument("--results", type=Path, help="folder; by default results beside this file, in DIR for tuning")
    parser.add_argument("--tables", action="store_true", help="of the results that are there; nothing runs")
    options = parser.parse_args()
    if options.out is None and not options.tables:
        parser.error("name a folder for the runs, --out DIR, or ask for --tables")
    if any(seed < 0 for seed in options.seeds or []):
        parser.error("--seeds: from 0 on")
    tuning = [seed for seed in options.seeds or [] if seed >= settings.SEEDS["tuning"]]
    if tuning and len(tuning) < len(options.seeds):
        parser.error(f"--seeds: those from {settings.SEEDS['tuning']} on are for tuning, and run by themselves")
    if not tuning and not options.tables and (tried := sorted(TRIED.keys() & options.arms)):
        parser.error(f"--arms {' '.join(tried)}: not of the plan, so on --seeds for tuning alone")
    out = options.out and options.out.absolute()
    results = (options.results or (out / "tuning" if tuning else records.RESULTS)).absolute()
    os.chdir(ROOT)
    try:
        if not options.tables:
            work(out, results, options.arms, options.seeds)
        sys.stdout.write(tables.write(results))
    except Refused as error:
        fail(error)


def work(out: Path, results: Path, arms: list[str], seeds: list[int] | None) -> None:
    """Seed by seed, so that what arms share is made once and deleted with its seed."""
    from work import Seed  # imports torch, which tables do without

    commit = records.commit_of_code()
    planned = {arm: seeds if seeds is not None else list(seeds_of(arm)) for arm in arms}
    for seed in sorted({seed for mine in planned.values() for seed in mine}):
        asked = [arm for arm in arms if seed in planned[arm] and not records.is_there(results, arm, seed, commit)]
        its = Seed(records.place_of(out, commit), seed) if asked else None
        for arm in asked:
            figures = its.figures(arm)
            if records.commit_of_code() != commit:
                raise Refused(f"the code changed while {arm} of seed {seed} was run: run it again, from a work tree")
            records.write(results, arm, seed, commit, figures)
        if its is not None:
            shutil.rmtree(its.folder)


if __name__ == "__main__":
    main()
