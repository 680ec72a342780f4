"""Pretraining: from a preparation with a tokenizer of its own to a model that knows more than unigrams."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, config_of, launch
from test_preparation_tokens import prepare_whole, settings
from torch import nn

import trainers.recovery
from rlt.errors import Refused
from rlt.planning.plan import make_plan
from rlt.planning.resolve import resolve
from rlt.runs.folder import TOKENS, mark_complete
from rlt.tokens.files import read_arrays
from trainers.fp8 import takes_fp8
from trainers.packed import IGNORED
from trainers.pretrain import PretrainTrainer

TORCHAO = "torchao==0.18.0"
SHAPE = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
CURRICULUM = "[{until_step: 4, buckets: {32: 0.5, 64: 0.5}}, {buckets: {32: 0.25, 64: 0.75}}]"
RUN = [
    *("run_cfg=pretrain_tiny", "report_to=null", "bf16=false", "warmup_run=null", f"model_shape={SHAPE}"),
    *("max_length=64", "train_batch_size=4", "per_device_train_batch_size=2", "eval_size=2", "eval_steps=100"),
    *("save_steps=100", "logging_steps=1", f"curriculum={CURRICULUM}", "max_steps=6"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Texts of two sources, with a tokenizer of their own, in rows of two lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, words in (("counts", "one two three four five six"), ("days", "Monday comes before Tuesday and Friday")):
        texts = [{"text": f"{n}: {words} " * (1 + n % 7)} for n in range(120)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    keys = {"stages": ["read", "split", "tokens", "pack"], "train_tokenizer": 320, "pack_length": 64}
    given = settings(folder, engine_tasks=1, validation_share=0.2, pack_buckets=[32], **keys)
    sources = [str(folder / f"{name}.jsonl") for name in ("counts", "days")]
    prepare_whole(type(given)(**{**vars(given), "sources": sources}))
    return folder / "out"


def pretraining(corpus: Path, folder: Path, *overrides: str) -> PretrainTrainer:
    trainer, _ = build(RUN, folder, f"dataset_id_or_path={corpus}", *overrides)
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_a_model_of_the_asked_shape_learns_and_says_how_it_compares_with_unigrams(corpus, tmp_path):
    trainer = pretraining(corpus, tmp_path / "run", "max_steps=30", "learning_rate=0.01", "eval_steps=15")
    before = weights(trainer)
    trainer.train()
    assert all(not torch.equal(before[name], now) for name, now in weights(trainer).items())
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] < losses[0] < math.log(320) + 0.5
    found = re.fullmatch(
        r"held-out loss ([\d.]+) nats a token \(counts [\d.]+, days [\d.]+\); unigrams have ([\d.]+)",
        trainer.sentence(),
    )
    assert float(found[1]) < float(found[2])
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["train_tokens_per_second"] > 0 for log in logged)
    room = 4 * 64
    assert all(0.8 * room * log["step"] < log["num_tokens"] <= room * log["step"] for log in logged)


def test_the_same_seed_gives_the_same_random_weights_and_another_others(corpus, tmp_path):
    first, again, other = (
        weights(pretraining(corpus, tmp_path / name, f"seed={seed}")) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_loss_of_each_source_is_that_of_its_held_out_sequences_one_by_one(corpus, tmp_path):
    trainer = pretraining(corpus, tmp_path / "run", "eval_size=100")
    metrics = trainer.evaluate()
    sums = {"counts": [0.0, 0], "days": [0.0, 0]}
    with torch.no_grad():
        for row in read_arrays(corpus / TOKENS / "validation-00000.parquet"):
            if row["length"] > 64:
                continue
            ids = torch.tensor(row["input_ids"].tolist())
            log_probs = trainer.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            sums[row["source"]][0] -= float(log_probs[:-1].gather(-1, ids[1:, None]).sum())
            sums[row["source"]][1] += len(ids) - 1
    for source, (nll, tokens) in sums.items():
        assert metrics[f"eval_{source}_loss"] == pytest.approx(nll / tokens, abs=1e-5)
    total = [sum(values) for values in zip(*sums.values(), strict=True)]
    assert metrics["eval_loss"] == pytest.approx(total[0] / total[1], abs=1e-5)


def rows_seen(trainer) -> list:
    """Notes the ids of every micro-batch that is trained on."""
    seen, compute = [], trainer.compute_loss

    def note(model, inputs, **options):
        seen.append(inputs["input_ids"].tolist())
        return compute(model, inputs, **options)

    trainer.compute_loss = note
    return seen


@pytest.mark.parametrize("stop", [2, 4, 5])  # amid both phases, and between them
def test_a_run_that_goes_on_amid_a_phase_is_the_undisturbed_one(stop, corpus, tmp_path):
    whole = pretraining(corpus, tmp_path / "whole")
    wanted = rows_seen(whole)
    whole.train()
    first = pretraining(corpus, tmp_path / "parts", f"save_steps={stop}", "save_total_limit=null")
    first.train()
    again = pretraining(corpus, tmp_path / "parts")
    seen = rows_seen(again)
    again.train(resume_from_checkpoint=str(tmp_path / f"parts/checkpoint-{stop}"))
    assert seen == wanted[2 * stop :]  # two micro-batches a step
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert again.curriculum.begin.round == 2 * stop  # from the checkpoint, not counted off


def test_a_step_has_the_same_tokens_whatever_the_lengths_of_its_rows(corpus, tmp_path):
    trainer = pretraining(corpus, tmp_path / "run")
    batches = list(trainer.get_train_dataloader())
    shapes = [batch["input_ids"].shape for batch in batches]
    assert {(rows, 32 if width <= 32 else 64) for rows, width in shapes} == {(2, 64), (4, 32)}  # a few end short


class ShortOfMemory:
    """Throws where memory would run out: at a forward or a backward pass, counted from 1, each once."""

    def __init__(self, trainer, monkeypatch, forward: set[int] = frozenset(), backward: set[int] = frozenset()):
        self.counts, self.left = {"forward": 0, "backward": 0}, {"forward": set(forward), "backward": set(backward)}
        nll, add = trainer._nll, trainers.recovery.add_gradients

        def add_gradients(accelerator, loss, last):
            add(accelerator, loss, last)  # gradients of a backward pass that breaks off are there in part
            self.reach("backward")

        def forward_pass(model, inputs):
            self.reach("forward")
            return nll(model, inputs)

        monkeypatch.setattr(trainer, "_nll", forward_pass)
        monkeypatch.setattr(trainers.recovery, "add_gradients", add_gradients)

    def reach(self, place: str) -> None:
        self.counts[place] += 1
        if self.counts[place] in self.left[place]:
            self.left[place].remove(self.counts[place])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize(
    "places", [{"forward": {1}}, {"forward": {2}}, {"backward": {1}}, {"backward": {2}}, {"forward": {1, 3}}]
)
def test_a_step_that_runs_out_of_memory_has_the_gradients_of_an_undisturbed_one(places, corpus, tmp_path, monkeypatch):
    one_step = ("max_steps=1", "optim=sgd", "learning_rate=1.0", "warmup_steps=0", "lr_scheduler_type=constant")
    one_step += ("train_batch_size=8", "per_device_train_batch_size=4", "max_grad_norm=0", "weight_decay=0")
    found = []
    for name in ("undisturbed", "short"):
        trainer = pretraining(corpus, tmp_path / name, *one_step)
        trainer.model.double()
        if name == "short":
            short = ShortOfMemory(trainer, monkeypatch, **places)
        trainer.train()
        found.append(weights(trainer))
    assert not any(short.left.values())
    assert trainer._update_budget.recovered == sum(map(len, places.values()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=0)


def test_one_row_that_does_not_fit_ends_the_run_with_a_remedy(corpus, tmp_path, monkeypatch):
    trainer = pretraining(corpus, tmp_path / "run", "max_steps=1")
    ShortOfMemory(trainer, monkeypatch, forward=set(range(1, 99)))
    with pytest.raises(Refused, match="lower per_device_train_batch_size"):
        trainer.train()


def test_rows_that_are_filled_up_for_compilation_have_the_same_loss(corpus, tmp_path):
    plain, compiled = (pretraining(corpus, tmp_path / str(way)) for way in (False, True))
    compiled.data_collator.whole = True
    for one, other in zip(plain.get_train_dataloader(), compiled.get_train_dataloader(), strict=True):
        assert other["input_ids"].shape[1] in (32, 64)
        count = (one["labels"] != IGNORED).sum()
        losses = [t.compute_loss(t.model, b, num_items_in_batch=count) for t, b in ((plain, one), (compiled, other))]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(corpus, tmp_path):
    losses = []
    for compiles in ("false", "true"):
        trainer = pretraining(corpus, tmp_path / compiles, f"torch_compile={compiles}", "max_steps=3")
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_pretrained_model_can_be_pretrained_further(corpus, tmp_path):
    trainer = pretraining(corpus, tmp_path / "first", "max_steps=2")
    trainer.train()
    trainer.save_model(str(tmp_path / "first"))
    trainer.processing_class.save_pretrained(str(tmp_path / "first"))
    first = weights(trainer)
    further = pretraining(corpus, tmp_path / "on", f"model_name_or_path={tmp_path / 'first'}", "model_shape=null")
    assert all(torch.equal(value, first[name]) for name, value in weights(further).items())


REFUSED = [
    (["model_name_or_path=embedded/smollm2-135m-instruct"], "name a model to go on from, or the shape of a new one"),
    (["model_shape={model_type: null}"], "model_shape needs model_type"),
    (["use_peft=true"], "random weights are trained as a whole"),
    (["fp8=yes please"], "fp8=yes please: use true, false, or emulate"),
    (["max_steps=-1"], "curriculum with max_steps=-1"),
    (["curriculum=[{buckets: {48: 1}}]"], "48 does not divide max_length=64"),
    (["eval_steps=null"], "rows are held out and never looked at"),
    (["packing=true"], "runs here need it as it is"),
    (["dataset_id_or_path=results/nothing_here"], "holds no packed rows: prepare it with the stages tokens and pack"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_cannot_work_is_refused_in_the_plan(overrides, message, corpus, tmp_path):
    given = [*RUN, f"dataset_id_or_path={corpus}", f"output_dir={tmp_path}", *overrides]
    with pytest.raises(Refused, match=re.escape(message)):
        make_plan(config_of(*given))


@pytest.mark.parametrize("package", ["torchao", "liger_kernel"])
def test_kernels_whose_package_is_missing_are_refused_by_its_name(package, corpus, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    keys = {"torchao": "fp8=true", "liger_kernel": "use_liger_kernel=true"}
    given = [*RUN, f"dataset_id_or_path={corpus}", f"output_dir={tmp_path}", keys[package]]
    with pytest.raises(Refused, match=package.replace("_", "-")):
        make_plan(config_of(*given))


BUILT = [
    ("model_shape={model_type: llama, hidden: 8}", "hidden is no field of a llama configuration"),
    ("model_shape={model_type: lama}", "transformers has no model_type=lama"),
    ("max_length=32", "max_length=32: the packed rows of"),
    (f"model_shape={SHAPE[:-1]}, max_position_embeddings: 32}}", "longer than model_shape's max_position_embeddings"),
]


@pytest.mark.parametrize(("override", "message"), BUILT)
def test_what_does_not_fit_the_rows_is_refused_before_training(override, message, corpus, tmp_path):
    with pytest.raises(Refused, match=message):
        pretraining(corpus, tmp_path / "run", "curriculum=null", override)


def test_only_large_layers_of_the_right_shape_compute_in_fp8():
    model = nn.Sequential(*(nn.Linear(*shape) for shape in ((64, 64), (64, 64), (64, 40), (16, 32), (64, 64))))
    takes = takes_fp8(model, smallest=1024)
    assert [name for name, module in model.named_modules() if takes(module, name)] == ["1"]  # not the ends, not 40


@pytest.fixture
def torchao(tmp_path, monkeypatch):
    """Of the test alone: libraries of the project act in another way where they find it."""
    command = [str(ROOT / ".venv" / "bin" / "uv"), "pip", "install", "-q", "--no-deps", f"--target={tmp_path}"]
    subprocess.run([*command, TORCHAO], check=True, timeout=300)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.slow
def test_emulated_fp8_computes_nearly_the_same(torchao):
    from trainers.fp8 import compute_in_fp8

    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="this device has no FP8"):
            compute_in_fp8(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), emulate=False, smallest=1)
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).bfloat16()
    converted = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).bfloat16()
    converted.load_state_dict(plain.state_dict())
    assert compute_in_fp8(converted, emulate=True, smallest=1) == 2
    given = torch.randn(32, 64, dtype=torch.bfloat16)
    for model in (plain, converted):
        model(given).square().sum().backward()
    torch.testing.assert_close(converted(given), plain(given), atol=0.05, rtol=0.1)
    for mine, theirs in zip(converted.parameters(), plain.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.99


def test_a_preparation_goes_first_until_it_is_complete(tmp_path):
    given = ["pretrain_tiny", f"results_dir={tmp_path}", "report_to=null"]
    found = resolve(config_of("run_cfg=pretrain_tiny", *given[1:]), given)
    assert found.plan.config["dataset_id_or_path"] == f"{tmp_path}/prepare_pretrain_tiny"
    assert found.warmup[:2] == ["run_cfg=prepare_pretrain_tiny", f"results_dir='{tmp_path}'"]
    named = [*given, f"dataset_id_or_path={tmp_path}"]
    with pytest.raises(Refused, match="holds no packed rows"):
        resolve(config_of("run_cfg=pretrain_tiny", *named[1:]), named)


def test_a_complete_preparation_does_not_go_again(corpus, tmp_path):
    from rlt.runs.folder import prepare_output

    first = config_of("run_cfg=prepare_pretrain_tiny", f"results_dir={tmp_path}", "report_to=null")
    prepare_output(first)
    (tmp_path / "prepare_pretrain_tiny/packed").symlink_to(corpus / "packed")
    mark_complete(tmp_path / "prepare_pretrain_tiny", {"rows": 1})
    given = ["pretrain_tiny", f"results_dir={tmp_path}", "report_to=null"]
    assert resolve(config_of("run_cfg=pretrain_tiny", *given[1:]), given).warmup is None


@pytest.mark.slow
def test_pretrain_tiny_learns_more_than_unigrams(tmp_path):
    done = launch("train.py", "pretrain_tiny", f"results_dir={tmp_path}", "report_to=null")
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"held-out loss ([\d.]+) nats a token \(.*\); unigrams have ([\d.]+)", done.stdout)
    assert float(found[1]) < float(found[2])
