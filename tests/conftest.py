"""A tiny random model with a real tokenizer, and runs of the real entry points."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_tokenizer
from rlt.planning.configuration import compose_config
from rlt.planning.plan import make_plan
from rlt.runs.folder import prepare_output
from trainers.build import build_trainer

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded/smollm2-135m-instruct"
RUN_TIMEOUT_S = 300
RANKS_TIMEOUT_S = 120
# A whole teacher run of seconds: two prompts of four completions, sixteen tokens each.
TINY_RUN = [
    "run_cfg=teacher_rlt_tiny",
    "report_to=null",
    "bf16=false",
    "train_batch_size=8",
    "per_device_train_batch_size=4",
    "num_generations=4",
    "max_completion_length=16",
    "dataset_size=12",
    "eval_size=2",
    "num_generations_eval=2",
    "learning_rate=1e-3",
]


def pytest_sessionstart(session):
    """What imports said is dropped: with workers it would stand behind the closing line."""
    session.config.pluginmanager.getplugin("capturemanager").read_global_capture()


def pytest_collection_modifyitems(items):
    """The longest first: with workers, one that begins late would end alone."""
    items.sort(key=lambda item: item.path.name != "test_ranks.py")


def save_tiny(folder: Path, seed: int) -> str:
    tokenizer = load_tokenizer(str(embedded_model_path(EMBEDDED)))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", seed=0)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(embedded_model_path(EMBEDDED)))


@pytest.fixture(scope="session")
def tiny_run(tiny_teacher, tiny_student):
    """Overrides of a teacher run on tiny models, with Hugging Face generation."""
    return [*TINY_RUN, f"model_name_or_path={tiny_teacher}", f"student_model={tiny_student}", "use_vllm=false"]


def launch(
    script: str, *arguments: str, limit_s: float = RUN_TIMEOUT_S, **environment: str
) -> subprocess.CompletedProcess:
    """Run an entry point for real, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={**os.environ, **environment},
    )


def spawn_ranks(function, arguments: tuple, ranks: int = 2) -> None:
    """`function(rank, *arguments)` in processes of their own, which are ended when they take too long."""
    context = multiprocessing.spawn(function, args=arguments, nprocs=ranks, join=False)
    deadline = time.monotonic() + RANKS_TIMEOUT_S
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"ranks still running after {RANKS_TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()


def config_of(*overrides: str) -> dict:
    """The resolved, flat configuration of a command line."""
    return compose_config(list(overrides))[0]


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def build(tiny_run, folder, *overrides):
    """The trainer of a tiny run in an output folder, and its held-out evaluation."""
    plan = make_plan(config_of(*tiny_run, f"output_dir={folder}", *overrides))
    prepare_output(plan.config)
    return build_trainer(plan)


def assert_best_is_kept(folder: Path, greater_is_better: bool, said: str) -> None:
    """A GRPO run of three evaluated steps ended with the weights of the best one, and said so."""
    evaluated = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    means = [sum(record["reward"]) / len(record["reward"]) for record in evaluated]
    best = means.index((max if greater_is_better else min)(means[1:]))
    final, wanted = (load_file(place / "model.safetensors") for place in (folder, folder / f"checkpoint-{best}"))
    assert all(torch.equal(final[name], wanted[name]) for name in wanted)
    assert f"{means[0]:.3f} -> {means[best]:.3f}" in said
    assert f"step {best}, chosen on these questions from 3 evaluations" in said
