"""The recipes, run as a user runs them, through a real server; and that their numbers are those of the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from short_of_memory import generate

pytest.importorskip("sqlalchemy")

from test_serving_worker import KEY, served  # noqa: E402

from rlt.models.loading import load_tokenizer  # noqa: E402
from rlt.serving import Client  # noqa: E402
from rlt.wire.values import AdamParams  # noqa: E402
from trainers.teacher_grpo import TeacherGRPOTrainer  # noqa: E402

LIMIT_S = 240
STEPS = 3
RANK = 4


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_teacher, tiny_student):
    folder = tmp_path_factory.mktemp("recipes") / "state"
    with served(folder, f"base_models=[{tiny_teacher},{tiny_student}]", "sampler=torch") as address:
        yield address


@pytest.fixture
def recipes(monkeypatch):
    """Their folder is where Python looks when one is run."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def run(name: str, *words: str, key: str = KEY) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RLT_API_KEY": key, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)


def figures(done: subprocess.CompletedProcess, name: str) -> list[float]:
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    return [float(words[words.index(name) + 1]) for words in lines]


def test_a_recipe_has_less_than_120_lines():
    sizes = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "recipes").glob("*.py")}
    assert len(sizes) == 5
    assert max(sizes.values()) < 120, sizes


def test_supervised_losses_are_the_same_here_and_through_a_server(address, tiny_teacher, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1", "solution": str(n + 1)}) + "\n" for n in range(6)))
    words = [f"model={tiny_teacher}", "steps=4", "batch_size=2", f"data={rows}", "learning_rate=1e-2"]
    here = figures(run("sft_loop", *words, f"folder={tmp_path / 'runs'}"), "loss")
    there = figures(run("sft_loop", *words, f"base_url={address}"), "loss")
    assert here == there
    assert here[3] < here[0]
    assert (tmp_path / "runs" / "sft" / "sft").is_dir()


def test_dpo_by_a_loss_of_ones_own_is_the_servers_dpo(address, tiny_teacher, recipes):
    import dpo_loop

    done = run("dpo_loop", f"base_url={address}", f"model={tiny_teacher}", "steps=3", "pairs=2", "learning_rate=1e-2")
    losses = figures(done, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses == sorted(losses, reverse=True)
    with Client(address, KEY) as client:
        model, base = (client.create_model(tiny_teacher, rank=rank, seed=0) for rank in (16, 1))
        rows = dpo_loop.pairs_of(client, tiny_teacher, 2)
        reference = [values.tolist() for values in dpo_loop.log_probs_of(base, rows)]
        inputs = [{**row, "ref_logprobs": ref} for (_, row), ref in zip(rows, reference, strict=True)]
        data = [dpo_loop.datum(ids, **each) for (ids, _), each in zip(rows, inputs, strict=True)]
        own = [model.train_batch(data, "dpo", AdamParams(1e-2), {"beta": 0.1})["loss:sum"] / 2 for _ in range(3)]
    assert own == pytest.approx(losses, abs=1e-3)  # a mean and a sum: Adam does not see the factor


def test_grpo_runs_to_its_interval(address, tiny_teacher):
    words = ("steps=2", "questions=2", "samples=2", "held_out=3", "learning_rate=1e-3")
    done = run("grpo_loop", f"base_url={address}", f"model={tiny_teacher}", *words)
    assert len(figures(done, "reward")) == 2
    assert "held out 0.000 -> 0.000, 95 % interval of the difference [0.000, 0.000]" in done.stdout


def test_the_teachers_loop_runs_by_itself(address, tiny_teacher, tiny_student):
    words = (f"model={tiny_teacher}", f"student={tiny_student}", "steps=2", "samples=2", "max_tokens=8")
    rewards = figures(run("rl_loop", f"base_url={address}", *words), "reward")
    assert len(rewards) == 2
    assert all(abs(value) < 1e4 for value in rewards)


def watched(monkeypatch) -> list[dict]:
    """Rows, texts and losses of each of the trainer's steps; completions are fixed."""
    steps, score, loss = [], TeacherGRPOTrainer._generate_and_score_completions, TeacherGRPOTrainer.compute_loss

    def scored(self, inputs):
        batch = score(self, inputs)
        names = [f"{part}_{kind}" for part in ("prompt", "completion") for kind in ("ids", "mask")]
        steps.append({"rows": inputs, "losses": [], **{name: batch[name].clone() for name in names}})
        return batch

    def computed(self, model, inputs, *args, **kwargs):
        value = loss(self, model, inputs, *args, **kwargs)
        steps[-1]["losses"].append(value.item())
        return value

    monkeypatch.setattr(TeacherGRPOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(TeacherGRPOTrainer, "_generate_and_score_completions", scored)
    monkeypatch.setattr(TeacherGRPOTrainer, "compute_loss", computed)
    return steps


def unpadded(step: dict, part: str) -> list[list[int]]:
    rows = zip(step[f"{part}_ids"], step[f"{part}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def test_the_teachers_losses_are_the_trainers(
    address, tiny_run, tiny_teacher, tiny_student, tmp_path, in_root, monkeypatch, recipes
):
    import rl_loop

    more = ["eval_size=0", f"max_steps={STEPS}", "temperature=1.0", "unbias_student_log_probs_temp=1.0", "beta=0.1"]
    more += ["lr_scheduler_type=constant", "warmup_steps=0", "weight_decay=0.0", "loss_type=dapo", "save_steps=100"]
    more += ["use_peft=true", f"lora_r={RANK}", "lora_alpha=32"]
    trainer, _ = build(tiny_run, tmp_path / "run", *more)
    steps, args = watched(monkeypatch), trainer.args
    tokenizer = load_tokenizer(tiny_teacher)
    params = AdamParams(
        args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon, 0.0, args.max_grad_norm
    )
    with Client(address, KEY) as client:
        teacher = client.create_model(tiny_teacher, rank=RANK, seed=1, train_unembed=False)
        start = load_file(teacher.download(Path(tmp_path) / "adapter") / "adapter_model.safetensors")
        set_peft_model_state_dict(trainer.model, start)
        trainer.train()
        student = client.create_model(tiny_student, rank=1)
        reference = client.create_model(tiny_teacher, rank=1)
        reward = rl_loop.make_reward(tokenizer, teacher, student)
        assert len(steps) == STEPS
        for step in steps:
            prompts, completions = unpadded(step, "prompt"), unpadded(step, "completion")
            scored = reward.score(step["rows"], tokenizer.batch_decode(completions, skip_special_tokens=True))
            rewards_C = torch.tensor([each.reward for each in scored])
            data = rl_loop.data_of(prompts, completions, rewards_C, trainer.num_generations, reference)
            metrics = teacher.train_batch(data, "grpo", params, {"beta": args.beta})
            assert metrics["loss:sum"] == pytest.approx(sum(step["losses"]), abs=1e-5)
            assert abs(metrics["loss:sum"]) > 1e-6


@pytest.mark.parametrize(
    ("name", "words", "key", "said"),
    [
        ("sft_loop", ["stepz=3"], KEY, "stepz=3"),
        ("sft_loop", ["steps=x"], KEY, "steps=x"),
        ("sft_loop", ["model=embedded/gpt"], KEY, "embedded"),
        ("grpo_loop", [], "", "RLT_API_KEY"),
        ("dpo_loop", [], "tml-wrong-key", "401"),
    ],
)
def test_bad_input_ends_in_one_line(address, name, words, key, said):
    done = run(name, *words, *([] if name == "sft_loop" else [f"base_url={address}"]), key=key)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr
