"""Recipes of tinker-cookbook, unchanged, train the embedded model through `serve.py` to their end.

    pytest -m slow tests/test_serving_cookbook.py        # ten minutes on two cores, without a hub and without a GPU

Each one's command and seconds are in the log (`-s` shows them).
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from cookbook import (
    LOCAL,
    PUBLIC_NAME,
    RECIPES,
    RUN_S,
    Recipe,
    environment,
    make_place,
    python_of_cookbook,
    run_recipe,
    start_recipe,
)

pytest.importorskip("sqlalchemy")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
KEY = "tml-aaaaaaaaaaaa"
EMBEDDED = "embedded/smollm2-135m-instruct"
STOP_S = 30
STEPS, COMPARED = 10, 3
logger = logging.getLogger("rlt")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder that recipes run in, and their variables; the server runs as long."""
    from rlt.models.paths import resolve_model_path

    python_of_cookbook()
    folder = tmp_path_factory.mktemp("cookbook")
    make_place(folder, Path(resolve_model_path(EMBEDDED)))
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", f"state_dir={folder / 'state'}"]
    command += [f"base_models=[{PUBLIC_NAME}={EMBEDDED},{folder / LOCAL}]"]
    variables = {**os.environ, "RLT_API_KEY": KEY, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables)
    address = process.stdout.readline().split()[1]
    try:
        yield folder, environment(folder, address, KEY)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(place, name):
    folder, variables = place
    recipe, began = RECIPES[name], time.monotonic()
    if recipe.after and not (folder / "runs" / recipe.after / "checkpoints.jsonl").exists():
        run_recipe(recipe.after, RECIPES[recipe.after], folder, variables)
    rows = run_recipe(name, recipe, folder, variables)
    logger.info("%s: python %s: %.0f s", name, " ".join(recipe.command(name, folder)), time.monotonic() - began)
    assert len(rows) >= recipe.steps, rows
    assert "Traceback" not in (folder / "server.log").read_text()


LOOP = Recipe(
    "rl_loop",
    (
        *("batch_size=2", "group_size=2", "max_tokens=16", "max_steps=3", "save_every=1"),
        "loss_fn=importance_sampling",
    ),
    3,
)


def test_a_loop_that_is_killed_goes_on_from_its_last_state(place):
    """The recipe keeps a state before its second step, and is killed then. Its metrics are added to."""
    folder, variables = place
    kept, end = folder / "runs" / "loop" / "checkpoints.jsonl", time.monotonic() + RUN_S
    with start_recipe("loop", LOOP, folder, variables) as killed:
        while not (kept.exists() and kept.read_text().endswith("\n")) and time.monotonic() < end:
            assert killed.poll() is None, (folder / "loop.log").read_text()[-3000:]
            time.sleep(0.05)
        killed.kill()
    steps = [row["step"] for row in run_recipe("loop", LOOP, folder, variables)]
    assert (steps[0], steps[-2:], steps.count(0)) == (0, [1, 2], 1), steps


LEARNING = Recipe(
    "math_rl.train",
    (
        *("env=arithmetic", "group_size=8", "groups_per_batch=8", "max_tokens=5", "loss_fn=importance_sampling"),
        *("learning_rate=2e-4", f"max_steps={STEPS}", "save_every=0", "eval_every=0"),
    ),
    STEPS,
)


def test_the_reward_of_arithmetic_rises(place):
    """Sums of two numbers up to 100, each step other questions: those of the last steps against those of the first
    step, which the untrained model answers."""
    folder, variables = place
    began = time.monotonic()
    run_recipe("learning", LEARNING, folder, variables)
    groups = [rewards_of_groups(folder / "runs" / "learning", step) for step in range(STEPS)]
    after = np.concatenate(groups[-COMPARED:])
    low, high = bootstrap_interval(groups[0], after)
    figures = f"{groups[0].mean():.3f} -> {after.mean():.3f}, 95 % interval of the difference [{low:.3f}, {high:.3f}]"
    logger.info("%s, %.0f s", figures, time.monotonic() - began)
    assert low > 0


def rewards_of_groups(folder: Path, step: int) -> np.ndarray:
    """The mean reward of each question's samples."""
    text = (folder / f"iteration_{step:06d}" / "train_rollout_summaries.jsonl").read_text()
    found = defaultdict(list)
    for row in map(json.loads, text.splitlines()):
        found[row["group_idx"]].append(row["total_reward"])
    return np.array([np.mean(rewards) for rewards in found.values()])


def bootstrap_interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """95 % of the difference of two means, over questions."""
    chance = np.random.default_rng(0)
    drawn = [chance.choice(each, (10_000, len(each))).mean(1) for each in (before, after)]
    low, high = np.quantile(drawn[1] - drawn[0], [0.025, 0.975])
    return float(low), float(high)
