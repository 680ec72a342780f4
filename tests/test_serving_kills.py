"""A server that is killed at random moments of a run: its clients finish, and the weights are those of a calm run."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("sqlalchemy")

from safetensors.numpy import load_file  # noqa: E402
from serving_kills import KEY, Killer, Mortal, unigram_folder  # noqa: E402

from rlt.serving.client import Client, datum  # noqa: E402
from rlt.wire.values import AdamParams, SamplingParams  # noqa: E402

pytestmark = pytest.mark.slow
LIMIT_S = 300
AHEAD = 4  # steps on their way


def data(step: int, vocabulary: int = 256) -> list:
    targets = [[(step * shift + place) % vocabulary for place in range(6)] for shift in (3, 7)]
    return [datum([1 + step % 9] * 6, target_tokens=each) for each in targets]


def story(client: Client, base_model: str, number: int, steps: int, tick) -> dict:
    """Steps of one model, with states that are saved and loaded and samples that are drawn in between."""
    model = client.create_model(base_model, rank=4, seed=number)
    sent, losses, tokens = [], [], []
    for step in range(steps):
        tick()
        sent.append((model.forward_backward(data(step + number), "cross_entropy"), model.optim_step(AdamParams(1e-2))))
        if step % 5 == 4:
            path = model.save_state(f"{step}").result(LIMIT_S)["path"]
            model.load_state(path).result(LIMIT_S)
        if step % 7 == 6:
            asked = SamplingParams(max_tokens=5, seed=step, stop=[])
            sample = model.save_for_sampling().sample([1, 2, 3], asked).result(LIMIT_S)
            tokens.append(sample.sequences[0].tokens.tolist())
        while len(sent) > (AHEAD if step < steps - 1 else 0):
            read, done = sent.pop(0)
            losses.append(read.result(LIMIT_S).metrics["loss:sum"])
            assert done.result(LIMIT_S)["metrics"]["grad_norm"] > 0
    with tempfile.TemporaryDirectory() as folder:
        return {"losses": losses, "tokens": tokens, "weights": read_weights(model.download(Path(folder) / "out"))}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for path in folder.iterdir():
        if path.suffix == ".npz":
            arrays |= dict(np.load(path))
        elif path.suffix == ".safetensors":
            arrays |= load_file(path)
    return arrays


def run(server: Mortal, base_model: str, steps: int, models: int = 2, tick=lambda: None) -> list[dict]:
    with Client(server.address, KEY) as client, ThreadPoolExecutor(models) as pool:
        stories = [pool.submit(story, client, base_model, number, steps, tick) for number in range(models)]
        return [each.result(LIMIT_S) for each in stories]


def check_equal(seen: list[dict], calm: list[dict]) -> None:
    for mine, theirs in zip(seen, calm, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["tokens"] == theirs["tokens"]
        assert mine["weights"].keys() == theirs["weights"].keys() != set()
        for name, values in theirs["weights"].items():
            assert np.array_equal(mine["weights"][name], values), name


def disturbed(server: Mortal, base_model: str, steps: int, kills: int, seed: int, most_s: float) -> list[dict]:
    killer = Killer(server, kills, 2 * steps, seed, most_s)
    killer.start()
    seen = run(server, base_model, steps, tick=killer.ticks.release)
    killer.join(LIMIT_S)
    assert killer.kills == kills
    assert "Traceback" not in server.log
    return seen


def test_twenty_kills_change_nothing(tmp_path):
    base_model = unigram_folder(tmp_path / "unigram")
    flags = {"seconds": 0.02}
    with Mortal(tmp_path / "calm", base_model, flags) as server:
        calm = run(server, base_model, 100)
    with Mortal(tmp_path / "killed", base_model, flags) as server:
        seen = disturbed(server, base_model, 100, kills=20, seed=23, most_s=0.3)
    check_equal(seen, calm)


def test_kills_change_nothing_in_real_models(tmp_path, tiny_teacher):
    with Mortal(tmp_path / "calm", tiny_teacher) as server:
        calm = run(server, tiny_teacher, 20)
    with Mortal(tmp_path / "killed", tiny_teacher) as server:
        seen = disturbed(server, tiny_teacher, 20, kills=5, seed=7, most_s=1.0)
    check_equal(seen, calm)


def workers_of(server: Mortal) -> list[psutil.Process]:
    spawned = psutil.Process(server.process.pid).children()
    return [each for each in spawned if "spawn_main" in " ".join(each.cmdline())]


def test_workers_that_are_killed_change_nothing(tmp_path):
    base_model = unigram_folder(tmp_path / "unigram")
    with Mortal(tmp_path / "calm", base_model, {"seconds": 0.02}) as server:
        calm = run(server, base_model, 60)
    with Mortal(tmp_path / "killed", base_model, {"seconds": 0.02}) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, server, base_model, 60)
        chance = np.random.default_rng(5)
        for _ in range(10):
            time.sleep(chance.uniform(0.2, 1.0))
            for worker in workers_of(server):
                worker.kill()
        check_equal(running.result(LIMIT_S), calm)
