"""Two processes are one: the same losses and weights under every sharding, and checkpoints that go either way."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_best_is_kept, config_of, launch
from safetensors.torch import load_file

from rlt.launching.agent import run_ranks
from rlt.launching.environment import rank_environment
from rlt.planning.plan import make_plan
from rlt.runs.folder import prepare_output

STEPS, SAVED = 5, 3
ADAPTER = ["use_peft=true", "lora_r=4", "student_model=null", "learning_rate=1e-2"]
ALL = ("zero3", "fsdp", "ddp", "zero1", "zero2", "offload")


def shardings(*often: str) -> list:
    """All of them; what is not tried often is marked slow."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.fixture(scope="module")
def run_steps(tiny_run, tmp_path_factory, module_environment):
    """Trains on made-up completions, with `processes` under a sharding; the output folder.

    An epoch is of two steps, so that a run which is continued at its third is amid the second epoch.
    """

    def run(processes: int, sharding: str, *overrides: str, base: list[str] = tiny_run) -> Path:
        folder = tmp_path_factory.mktemp(f"{sharding}-{processes}")
        steps = [f"max_steps={STEPS}", f"save_steps={SAVED}", "save_total_limit=null", "max_completion_length=40"]
        config = config_of(*base, *steps, f"output_dir={folder}", "eval_size=0", "dataset_size=4", *overrides)
        plan = make_plan(config, processes, sharding=sharding)
        prepare_output(config)
        (folder / "plan-1.json").write_text(json.dumps(asdict(plan)))
        script = [sys.executable, str(ROOT / "tests/fixed_rank.py"), str(folder), module_environment]
        environment = rank_environment(sharding, processes, on_cpu=True)
        code = run_ranks(script, processes, folder / "logs", environment, folder)
        assert code == 0, (folder / "logs/rank-0.log").read_text()[-3000:]
        return folder

    return run


@pytest.fixture(scope="module")
def module_environment():
    """The id of this process, from the project's folder, where `-m` and plain scripts find its modules."""
    import os

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield str(os.getpid())


@pytest.fixture(scope="module")
def alone(run_steps):
    return run_steps(1, "ddp")


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_same(folder: Path, expected: Path) -> None:
    ours, theirs = losses(folder), losses(expected)
    assert STEPS in ours and ours.keys() <= theirs.keys()
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=1e-4)
    a, b = (load_file(f / "model.safetensors") for f in (folder, expected))
    start = load_file(next(expected.glob("checkpoint-3")) / "model.safetensors")
    assert a.keys() >= b.keys()  # DeepSpeed saves a tied head twice
    assert any((b[name] - start[name]).abs().max() > 1e-3 for name in b)  # there was something to learn
    for name in b:
        torch.testing.assert_close(a[name].float(), b[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sharding", shardings("fsdp"))
def test_two_processes_train_as_one_and_continue_each_other(sharding, alone, run_steps):
    together = run_steps(2, sharding)
    assert_same(together, alone)
    assert_same(run_steps(1, "ddp", f"resume_from={together}/checkpoint-{SAVED}"), alone)
    assert_same(run_steps(2, sharding, f"resume_from={alone}/checkpoint-{SAVED}"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["random", "generated"])
def test_what_a_reward_draws_is_the_same_on_two_processes(reward, run_steps):
    more = ["reward_cfg=" + reward] + ["answers_max_length=4"] * (reward == "generated")
    together, alone = run_steps(2, "ddp", *more), run_steps(1, "ddp", *more)
    assert_same(together, alone)
    if reward == "generated":
        records = [map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) for f in (together, alone)]
        cuts = [[record["reward_parts/answers_cut"] for record in some if "loss" in record] for some in records]
        assert cuts[0] == pytest.approx(cuts[1]) and cuts[0][0]


@pytest.mark.parametrize("sharding", shardings())
def test_a_rank_with_fewer_rewards_trains_along(sharding, run_steps, tiny_teacher):
    """One completion of a step has none, on one of the ranks: it is left out on both, and on a single one."""
    rewards = "reward_functions=[fixed_rank.reward_of_most]"
    plain = ["run_cfg=grpo_exact", f"model_name_or_path={tiny_teacher}", *TINY_RUN[1:], "use_vllm=false", rewards]
    many = "dataset_size=12"  # of few it learns so fast that last digits grow into visible ones
    together, alone = run_steps(2, sharding, many, base=plain), run_steps(1, "ddp", many, base=plain)
    records = map(json.loads, (together / "metrics.jsonl").read_text().splitlines())
    assert [r["completions/unscored"] for r in records if "loss" in r] == [2, 1, 1, 1, 1]
    assert_same(together, alone)


@pytest.mark.parametrize("sharding", shardings())
def test_a_warm_up_of_two_processes_is_that_of_one(sharding, tiny_teacher, tmp_path):
    rows = ["train_batch_size=8", "per_device_train_batch_size=2", "max_steps=3", "save_steps=100", "bf16=false"]
    run = ["teacher_sft_tiny", f"model_name_or_path={tiny_teacher}", *rows, "report_to=null", "learning_rate=1e-3"]
    for processes, kind in (("1", "ddp"), ("2", sharding)):
        done = launch("launch.py", processes, kind, *run, f"output_dir={tmp_path / processes}")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "1", tmp_path / "2"
    assert [losses(two)[step] for step in sorted(losses(two))] == pytest.approx(
        [losses(one)[step] for step in sorted(losses(one))], abs=1e-4
    )
    a, b, start = (load_file(Path(folder) / "model.safetensors") for folder in (two, one, tiny_teacher))
    assert any((b[name] - start[name]).abs().max() > 1e-3 for name in b)
    for name in b:
        torch.testing.assert_close(a[name].float(), b[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[], ADAPTER], ids=["all", "lora"])
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("sharding", ALL)
def test_engines_of_both_ranks_have_the_weights_of_the_shards(sharding, parallel, weights, tiny_run, tmp_path):
    run = ["use_vllm=true", "max_steps=2", "eval_size=3", "save_steps=100", "report_to=null"]
    run += [f"vllm_tensor_parallel_size={parallel}", *weights]
    done = launch("launch.py", "2", sharding, *tiny_run, *run, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    gaps = [r["sampling/sampling_logp_difference/mean"] for r in records if "loss" in r]
    assert len(gaps) == 2
    assert max(gaps) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("greater_is_better", [True, False])  # one of the two is not the last step
@pytest.mark.parametrize("sharding", ["zero3", "fsdp", "offload"])
def test_the_weights_with_the_best_held_out_reward_are_kept(sharding, greater_is_better, tiny_run, tmp_path):
    kept = ["load_best_model_at_end=true", "metric_for_best_model=reward", f"greater_is_better={greater_is_better}"]
    steps = ["eval_steps=1", "max_steps=3", "save_steps=100", "save_total_limit=null", "learning_rate=1e-2"]
    done = launch("launch.py", "2", sharding, *tiny_run, *kept, *steps, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_best_is_kept(tmp_path, greater_is_better, done.stdout)


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "an adapter over its teacher"])
@pytest.mark.parametrize("sharding", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp", "zero3")])
def test_two_processes_distil_as_one_and_continue_each_other(sharding, adapter, run_steps, tiny_teacher, tiny_student):
    small = ["run_cfg=student_opd_tiny", *TINY_RUN[1:], "use_vllm=false", f"model_name_or_path={tiny_student}"]
    small.append("lr_scheduler_type=constant")  # with the run file's the last steps hardly move a weight
    of_its_own = [*ADAPTER[:2], "learning_rate=1e-2", "teacher_model=null", "teacher_prompt=solution"]
    run = [*small, *(of_its_own if adapter else [f"teacher_model={tiny_teacher}"])]
    together, alone = run_steps(2, sharding, base=run), run_steps(1, "ddp", base=run)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    if not adapter:
        assert_same(together, alone)
        assert_same(run_steps(2, sharding, f"resume_from={alone}/checkpoint-{SAVED}", base=run), alone)
