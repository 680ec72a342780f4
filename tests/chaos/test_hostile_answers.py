"""Answers that hang, break or fill the process that checks them, 500 of them in one step of two ranks."""

import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import conftest
import psutil
import pytest
import torch.distributed as dist
from conftest import spawn_ranks
from figures import record
from test_checker import processes

from rlt.prompts.styles import FORMATS
from rlt.rewards.verified import verified_rewards
from rlt.rewards.verifiers import Verifier
from rlt.schema import VerifiedRewardConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HOSTILE = (
    *("9**9**9**9", "$9^{9^{9^{9^9}}}$", "10^{10^{10}}", "(10^9)!", "100000!!", "1e999999999", "9" * 4_000_000),
    *("\\frac{" * 3000, "\\sqrt{" * 500 + "2" + "}" * 500, "2^{" * 200 + "}" * 200, "(" * 10_000, "[" * 5000),
    *("\x00\ud800", "{}", "\udfff" * 1000, "x^{9999999}+1=0", "\\binom{10000000}{5000000}"),
    *("\\sum_{n=1}^{10000000} \\frac{1}{n^2}", "\\begin{pmatrix}" + "1&" * 3000 + "\\end{pmatrix}"),
    *("\\int_0^1 x^{10000}dx", "\\frac{1}{" * 50 + "2" + "}" * 50, "\\prod_{n=1}^{10^9} n^n"),
)
HOSTILE_ANSWERS, RANKS, DDP_TIMEOUT_S = 500, 2, 600


class Watch(threading.Thread):
    """The most memory that a rank's checker and its parent had at once, in GiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0.0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.02):
            held = 0
            for process in me.children(recursive=True):
                try:
                    held += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.most = max(self.most, held / 2**30)


def score_hostile(rank: int, folder: Path) -> None:
    """Each hostile text alone, then a batch of as many as this rank has, then a meeting with the other rank."""
    limit = timedelta(seconds=DDP_TIMEOUT_S)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    watch, alone = Watch(), []
    watch.start()
    verifier = Verifier()
    right = verifier.check("15838/2", {"solution": "7919"})
    for text in HOSTILE:
        began = time.monotonic()
        right += verifier.check(text, {"solution": "7919"})
        alone.append(time.monotonic() - began)
    right += verifier.check("15838/2", {"solution": "7919"})  # the child that hung has been replaced by then
    secrets = sum(b"canary" in Path(f"/proc/{process.pid}/environ").read_bytes() for process in processes())
    del verifier
    weights = {"answer_weight": 1.0, "format_weight": 0.0, "length_weight": 0.0}
    config = VerifiedRewardConfig(**weights, length_free=1, verifier="auto", verifier_limit_s=1.5)
    (answer_reward,), _ = verified_rewards(config, FORMATS["stratos"], DDP_TIMEOUT_S)
    texts = [f"Answer: {HOSTILE[number % len(HOSTILE)]}" for number in range(HOSTILE_ANSWERS // RANKS)]
    logged: dict[str, float] = {}
    began = time.monotonic()
    found = answer_reward(completions=texts, solution=["7919"] * len(texts), log_metric=logged.__setitem__)
    batch_s = time.monotonic() - began
    dist.barrier()
    watch.done.set()
    figures = {"right": right, "max_s": max(alone), "mean_s": sum(alone) / len(alone), "secrets": secrets}
    figures |= {"batch_s": batch_s, "rewarded": sum(found), "peak_gib": watch.most, **logged}
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def test_a_step_of_hostile_answers_on_two_ranks_ends_and_rewards_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setattr(conftest, "RANKS_TIMEOUT_S", DDP_TIMEOUT_S)
    spawn_ranks(score_hostile, (tmp_path,), RANKS)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    record(
        f"10. {HOSTILE_ANSWERS} hostile answers on {RANKS} ranks",
        seconds_each_at_most=f"{max(figures['max_s'] for figures in found):.2f}",
        batch_s=f"{max(figures['batch_s'] for figures in found):.0f}",
        peak_GiB_a_rank=f"{max(figures['peak_gib'] for figures in found):.2f}",
        secrets=max(figures["secrets"] for figures in found),
    )
    for figures in found:
        assert figures["right"] == 2.0  # the sums that came first and last
        assert figures["rewarded"] == figures["secrets"] == 0
        assert figures["peak_gib"] < 1.0
