"""An update that runs out of memory has the gradients of one that does not: one process, and two."""

import json
import os
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, TINY_RUN, build, config_of
from short_of_memory import Shortages, difference, generate, install

from rlt.launching.agent import run_ranks
from rlt.launching.environment import rank_environment
from rlt.planning.plan import make_plan
from rlt.runs.folder import prepare_output
from trainers.grpo import GRPOTrainer

# Two prompts of eight completions in two micro-batches, some without a reward; every step has the same rows.
RUN = [
    *("run_cfg=grpo_exact", *TINY_RUN[1:], "use_vllm=false", "eval_size=0", "save_steps=100", "shuffle_dataset=false"),
    *("reward_functions=[fixed_rank.reward_of_most]", "max_completion_length=64", "learning_rate=1e-30"),
    *("train_batch_size=16", "per_device_train_batch_size=8", "num_generations=8", "dataset_size=2"),
]
CALM: list = []


def once(place: str, times: int, rank: int = 0) -> list:
    return [(rank, place, times)]


ANYWHERE = [
    CALM,
    *(once(place, 1) for place in ("before", "inside", "head", "between", "backward", "after")),
    *(once(place, 2) for place in ("before", "inside", "head", "backward")),  # the second pass
    *(once(place, 4) for place in ("before", "head", "backward")),  # the second micro-batch
    *(once(place, 2) for place in ("between", "after")),
    once("before", 1) + once("before", 2),  # again while it is read without gradients
    once("backward", 1) + once("after", 1),  # again in the smaller passes
]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("loss_type", "cases"),
    [
        ("grpo", [CALM, once("backward", 4)]),
        slow("grpo", ANYWHERE),
        slow("dapo", ANYWHERE[:5]),
        slow("bnpo", ANYWHERE[:5]),
    ],
    ids=["grpo amid the last backward pass", "grpo anywhere", "dapo", "bnpo"],
)
def test_gradients_are_those_of_an_undisturbed_step(loss_type, cases, tiny_teacher, tmp_path, in_root, monkeypatch):
    run = [*RUN, f"loss_type={loss_type}", f"max_steps={len(cases)}"]
    found, shortages = [], Shortages(cases)
    install(monkeypatch, shortages, found)
    trainer, _ = build([*run, f"model_name_or_path={tiny_teacher}"], tmp_path)
    trainer.train()
    assert [step["step"] for step in found] == list(range(len(cases)))  # one optimizer step each
    assert shortages.thrown == sum(map(len, cases))
    differences = [difference(found, number) for number in range(len(found))]
    for number, step in enumerate(found):
        assert differences[number] < 1e-6, cases[number]
        assert step["same_random_state"]
        assert step["recovered"] == len(cases[number])
        assert step["figures"] == pytest.approx(found[0]["figures"], nan_ok=True), cases[number]


# Of two ranks: where a sharded model's ranks can stay in step, on either of them, in either micro-batch.
IN_STEP = [
    CALM,
    *(once(place, 1, rank) for rank in (0, 1) for place in ("before", "head", "between", "after")),
    *(once(place, 2, 1) for place in ("before", "head", "between", "after")),
    once("before", 4, 1),
    once("before", 1, 0) + once("head", 1, 1),  # both at once
    once("before", 1, 0) + once("before", 2, 1),  # again while it is read without gradients
    once("head", 1, 1) + once("after", 1, 0),  # again in the smaller passes
]
ANYWHERE_OF_TWO = [*IN_STEP, *(once(place, n, 1) for place in ("inside", "backward") for n in (1, 3))]
SHARDINGS = {"ddp": ANYWHERE_OF_TWO, "fsdp": IN_STEP, "zero3": IN_STEP, "zero2": IN_STEP, "zero1": IN_STEP}
FLOAT32 = ("zero1", "zero2", "zero3")  # DeepSpeed adds gradients up in it


@pytest.fixture
def run_two(tiny_teacher, tmp_path, in_root):
    """Two ranks under a sharding, whose steps are disturbed: the exit code."""

    def run(sharding: str, cases: list) -> int:
        run = [*RUN, "dataset_size=4", "train_batch_size=32", f"max_steps={len(cases)}"]
        config = config_of(*run, f"model_name_or_path={tiny_teacher}", f"output_dir={tmp_path}")
        prepare_output(config)
        (tmp_path / "plan-1.json").write_text(json.dumps(asdict(make_plan(config, 2, sharding=sharding))))
        (tmp_path / "cases.json").write_text(json.dumps({"cases": cases, "double": sharding not in FLOAT32}))
        script = [sys.executable, str(ROOT / "tests/short_of_memory.py"), str(tmp_path), str(os.getpid())]
        return run_ranks(script, 2, tmp_path / "logs", rank_environment(sharding, 2, on_cpu=True), tmp_path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gradients_of_two_ranks_are_those_of_an_undisturbed_step(sharding, run_two, tmp_path):
    cases = SHARDINGS[sharding]
    code = run_two(sharding, cases)
    assert code == 0, (tmp_path / "logs/rank-0.log").read_text()[-3000:]
    ranks = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    assert sum(rank["thrown"] for rank in ranks) == sum(map(len, cases))
    for rank in ranks:
        assert [step["step"] for step in rank["steps"]] == list(range(len(cases)))
        differences = [difference(rank["steps"], number) for number in range(len(cases))]
        for number, step in enumerate(rank["steps"]):
            assert differences[number] < (1e-5 if sharding in FLOAT32 else 1e-6), cases[number]
            assert step["same_random_state"]
            assert step["figures"] == pytest.approx(rank["steps"][0]["figures"], nan_ok=True), cases[number]
        assert all(step["tokens"] == other["tokens"] for step, other in zip(*(r["steps"] for r in ranks), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "cases", "line"),
    [
        ("fsdp", [CALM, once("inside", 1, 1)], "amid a pass of"),
        ("fsdp", [CALM, once("backward", 1, 1)], "amid a pass of"),
        ("zero3", [CALM, once("inside", 1, 1)], "amid a pass of"),
        ("zero3", [CALM, once("backward", 1, 1)], "amid a pass of"),
    ],
)
def test_amid_a_pass_of_a_sharded_model_the_run_ends_with_one_line(sharding, cases, line, run_two, tmp_path):
    code = run_two(sharding, cases)
    assert code not in (0, None)
    said = (tmp_path / "logs/rank-1.log").read_text()
    assert f"error: out of memory {line}" in said
    assert "Traceback" not in said


def test_a_scoring_pass_that_runs_out_of_memory_is_repeated_in_smaller_ones(
    tiny_teacher, tmp_path, in_root, monkeypatch
):
    """Of the reference, which is read without gradients."""
    found, thrown = [], []
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)

    def throw(*_):
        if not thrown:
            thrown.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    for name in ("calm", "short"):
        run = [*RUN, "max_steps=2", "beta=0.1", "learning_rate=1e-3", f"model_name_or_path={tiny_teacher}"]
        trainer, _ = build(run, tmp_path / name)
        if name == "short":
            trainer.ref_model.model.layers[1].register_forward_hook(throw)
        trainer.train()
        kept = [{key: line[key] for key in ("loss", "kl", "grad_norm")} for line in trainer.state.log_history[:2]]
        found.append(kept)
        assert trainer._scoring_budget.recovered == len(thrown)
    assert thrown and found[0][1]["kl"] > 0
    for calm, short in zip(*found, strict=True):
        assert short == pytest.approx(calm, rel=1e-5)
