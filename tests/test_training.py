"""Trainers on tiny random models: what moves, what does not, what is trained on, and what is left out."""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from conftest import assert_best_is_kept, build, config_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlt.jobs import run_plan
from rlt.models.loading import load_frozen
from rlt.models.residence import resident
from rlt.planning.plan import make_plan
from rlt.prompts.examples import example
from rlt.runs.folder import prepare_output
from rlt.runs.manifest import last_checkpoint
from trainers.build import build_trainer
from trainers.outputs import update_seconds

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_parameter_of_the_policy_moves_and_frozen_models_do_not(tiny_run, tmp_path, in_root):
    trainer, _ = build(tiny_run, tmp_path, "max_steps=2", "eval_size=0")
    models = {"policy": trainer.model, "student": trainer.student, "reference": trainer.ref_model}
    before = {name: parameters_of(model) for name, model in models.items()}
    trainer.train()
    after = {name: parameters_of(model) for name, model in models.items()}
    assert all(not torch.equal(before["policy"][k], after["policy"][k]) for k in before["policy"])
    for name in ("student", "reference"):
        assert all(torch.equal(before[name][k], after[name][k]) for k in before[name])


def test_a_synced_reference_moves_by_the_mixup_share(tiny_run, tmp_path, in_root):
    sync = ["sync_ref_model=true", "ref_model_sync_steps=1", "ref_model_mixup_alpha=0.9", "max_steps=1", "eval_size=0"]
    trainer, _ = build(tiny_run, tmp_path, *sync)
    start = parameters_of(trainer.model)
    trainer.train()
    for name, reference in trainer.ref_model.named_parameters():
        expected = 0.1 * start[name] + 0.9 * dict(trainer.model.named_parameters())[name]
        torch.testing.assert_close(reference, expected)


def test_twenty_updates_at_a_learning_rate_of_1e_6_arrive(tiny_run, tmp_path, in_root):
    trainer, _ = build(
        tiny_run, tmp_path, "learning_rate=1e-6", "max_steps=20", "bf16=true", "eval_size=0", "max_completion_length=4"
    )
    start = parameters_of(trainer.model)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for name, p in trainer.model.named_parameters():
        moved = (p - start[name]).abs()
        # Adam moves a parameter by at most about the learning rate per step; a bfloat16 near 0.2 has a spacing of 1e-3.
        assert 1e-7 < moved.max() <= 20 * 1.01e-6 * 1.5, name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_is_reached_by_its_key(tiny_run, tmp_path, in_root, loss_type):
    trainer, _ = build(tiny_run, tmp_path, f"loss_type={loss_type}", "max_steps=1", "eval_size=0")
    trainer.train()
    assert trainer.loss_type == loss_type
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_unscored_completion_is_as_if_it_were_not_there(tiny_run, tmp_path, in_root, loss_type):
    """Its gradients equal those of a batch in which that row was taken out and the others averaged without it."""
    trainer, _ = build(tiny_run, tmp_path, f"loss_type={loss_type}", "eval_size=0", "per_device_train_batch_size=8")
    score = trainer.reward.score_readings

    def spoiled(readings):
        scored = score(readings)
        return [type(s)(float("nan"), *list(vars(s).values())[1:]) if i == 2 else s for i, s in enumerate(scored)]

    trainer.reward.score_readings = spoiled
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(rows)
    assert batch["scored"].tolist() == [True, True, False, True, True, True, True, True]
    assert batch["advantages"][2] == 0
    others = batch["advantages"][[0, 1, 3]]
    assert others.sum().item() == pytest.approx(0, abs=1e-4)  # centred without the unscored sibling

    def gradients(inputs):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in trainer.model.parameters()]

    loss, ours = gradients(batch)
    kept = batch["scored"]
    alone = {k: v[kept] if v is not None and v.dim() and len(v) == 8 else v for k, v in batch.items()}
    alone["scored_share"] = torch.tensor(1.0)
    expected_loss, expected = gradients(alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)  # advantages cancel: some are 0 but for rounding
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_batch_without_a_score_gives_a_zero_loss_that_reaches_every_parameter(tiny_run, tmp_path, in_root):
    trainer, _ = build(tiny_run, tmp_path, "eval_size=0", "per_device_train_batch_size=8")
    score = trainer.reward.score_readings
    trainer.reward.score_readings = lambda readings: [
        type(s)(float("inf"), *list(vars(s).values())[1:]) for s in score(readings)
    ]
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_packed_log_probs_give_the_loss_and_gradients_of_stock_trl(tiny_run, tmp_path, in_root):
    import trl

    trainer, _ = build(tiny_run, tmp_path, "eval_size=0", "per_device_train_batch_size=8")
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(rows)

    def gradients(compute):
        trainer.model.zero_grad()
        loss = compute(trainer.model, batch)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    ours_loss, ours = gradients(trainer.compute_loss)
    trainer._get_per_token_logps_and_entropies = trl.GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
    stock_loss, stock = gradients(lambda model, inputs: trainer._compute_loss(model, inputs))
    assert ours_loss == pytest.approx(stock_loss, rel=1e-5, abs=1e-7)
    assert ((ours - stock).norm() / stock.norm()).item() < 1e-5


@pytest.mark.parametrize("bits", [[], ["load_in_4bit=true"], ["load_in_8bit=true"]], ids=["lora", "4-bit", "8-bit"])
def test_an_adapter_trains_and_is_saved_merged_on_request(tiny_run, tmp_path, in_root, bits):
    overrides = ["use_peft=true", "lora_r=4", "max_steps=1", "eval_size=0", "student_model=null", *bits]
    merged = [] if bits else ["save_merged_model=true"]
    plan = make_plan(config_of(*tiny_run, f"output_dir={tmp_path}", *overrides, *merged))
    prepare_output(plan.config)
    run_plan(plan)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}  # bfloat16 would not move by small rates
    assert (tmp_path / "merged" / "model.safetensors").is_file() == bool(merged)


def test_a_token_without_a_row_in_the_embedding_is_one_line(tiny_run, tiny_teacher, tmp_path, in_root):
    own = AutoTokenizer.from_pretrained(tiny_teacher)
    own.add_tokens(["<new>"])
    shutil.copytree(tiny_teacher, tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"its tokenizer has 49153 tokens and its embedding 49152 rows"):
        build(tiny_run, tmp_path / "run", f"model_name_or_path={tmp_path / 'model'}")


def test_an_adapter_on_one_side_of_a_tied_embedding_is_refused(tiny_run, tmp_path, in_root):
    overrides = ["use_peft=true", "lora_target_modules=[q_proj,embed_tokens]", "use_vllm=true", "student_model=null"]
    with pytest.raises(ValueError, match="embed_tokens is tied to the output head; leave it out"):
        build(tiny_run, tmp_path, *overrides)


@pytest.mark.parametrize("weights", [[], ["use_peft=true", "lora_r=4"]], ids=["all", "lora"])
def test_training_goes_on_from_an_adapters_folder(tiny_run, tiny_teacher, tmp_path, in_root, weights):
    adapter = get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2, init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "lora")
    trainer, _ = build(tiny_run, tmp_path / "run", f"model_name_or_path={tmp_path / 'lora'}", "eval_size=0", *weights)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(trainer.model.eval()(ids).logits, adapter.eval()(ids).logits)


def test_what_a_run_leaves_behind(tiny_run, tmp_path, in_root, capsys):
    plan = make_plan(
        config_of(*tiny_run, f"output_dir={tmp_path}", "max_steps=3", "save_steps=1", "save_total_limit=2")
    )
    prepare_output(plan.config)
    run_plan(plan)
    left = {p.name for p in tmp_path.iterdir()}
    assert {"config.yaml", "model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png", "COMPLETE"} <= left
    assert {name for name in left if name.startswith("checkpoint")} == {"checkpoint-2", "checkpoint-3"}
    assert not {name for name in left if name.startswith(".saving")}
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in logged if line["step"] == 1 and "loss" in line)
    assert {
        "reward",
        "kl",
        "update/seconds",
        "reward_parts/kl_reward",
        "reward_parts/format_rate",
        "completions/mean_length",
    } <= set(step)
    table = pandas.read_parquet(tmp_path / "completions" / "step-00003.parquet")
    assert len(table) == 8
    assert {"prompt", "completion", "reward", "solution_log_prob_reward", "advantage"} <= set(table.columns)
    evaluated = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluated] == [0, 3]
    assert all(len(e["reward"]) == 2 for e in evaluated)
    assert "paired difference" in capsys.readouterr().out


def test_an_update_is_what_is_left_of_its_steps():
    two_steps_on_one_batch = {"step_time": [9.0, 3.0], "generation/seconds": [4.0], "scoring/seconds": [2.0]}
    assert update_seconds(two_steps_on_one_batch) == 3.0
    assert update_seconds({"step_time": [5.0], "scoring/seconds": [2.0]}) == 3.0  # without an engine of its own


@pytest.mark.parametrize("greater_is_better", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_weights_with_the_best_held_out_reward_are_kept(greater_is_better, tiny_run, tmp_path, in_root, capsys):
    kept = ["load_best_model_at_end=true", "metric_for_best_model=reward", f"greater_is_better={greater_is_better}"]
    steps = ["eval_steps=1", "max_steps=3", "save_steps=100", "save_total_limit=1", "learning_rate=1e-2"]
    plan = make_plan(config_of(*tiny_run, *kept, *steps, f"output_dir={tmp_path}"))
    prepare_output(plan.config)
    run_plan(plan)
    assert_best_is_kept(tmp_path, greater_is_better, capsys.readouterr().out)
    with pytest.raises(ValueError, match="metric_for_best_model=accuracy: held-out questions have .*reward"):
        other = {"metric_for_best_model": "accuracy", "output_dir": str(tmp_path / "other")}
        run_plan(replace(plan, config={**plan.config, **other}))


def test_the_reference_can_be_the_student_and_waits_with_the_frozen_models(
    tiny_run, tiny_teacher, tmp_path, in_root, monkeypatch
):
    """It is read from the weights of the start, is here for its one pass a batch, and else on the CPU."""
    offload = ["student_model=null", "offload_untrained_models=true"]
    trainer, _ = build(tiny_run, tmp_path, *offload, "max_steps=2", "eval_size=0")
    start = load_frozen(tiny_teacher, torch.float32).to(trainer.accelerator.device)
    reference, asked = trainer.ref_model, trainer.reward.student_log_probs
    here, passes, answers = [], [], []

    @contextmanager
    def watched(model, device, offload):
        with resident(model, device, offload):
            here.append((model, offload))
            yield model
        here.pop()

    def both(*arguments):
        assert not here and next(reference.parameters()).device.type == "cpu"
        answers.append((asked(*arguments), trainer._frozen_log_probs(start, *arguments)))
        return answers[-1][0]

    trunk = reference.base_model.forward
    reference.base_model.forward = lambda *a, **k: passes.append(list(here)) or trunk(*a, **k)
    monkeypatch.setattr("trainers.grpo.resident", watched)
    trainer.reward.student_log_probs = both
    trainer.train()
    assert trainer.student is None
    assert passes == [[(reference, True)]] * 2 and len(answers) == 2
    for ours, expected in answers:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_plain_grpo_takes_a_users_reward_function(tiny_run, tmp_path, in_root):
    plain = [o for o in tiny_run[1:] if not o.startswith("student_model")]
    data = "dataset_id_or_path=reasoning_gym/gcd"
    plan = make_plan(config_of("run_cfg=grpo_exact", *plain, data, "max_steps=1", f"output_dir={tmp_path}"))
    prepare_output(plan.config)
    run_plan(plan)
    evaluated = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert set(evaluated["reward"]) <= {0.0, 0.5, 1.0}


def of_another_task(completions, log_extra, **_) -> list[None]:
    """A reward with nothing to say of these rows, which logs text."""
    log_extra("answer", completions)
    return [None] * len(completions)


@pytest.mark.parametrize(("updates", "kept"), [(1, False), (2, True)])
def test_one_update_a_batch_is_of_the_policy_that_read_it_and_clips_nothing(tiny_run, tmp_path, in_root, updates, kept):
    trainer, _ = build(tiny_run, tmp_path, "bf16=true", "eval_size=0", f"num_iterations={updates}")
    write = trainer._write

    def as_an_engine(prompt_ids, by_hugging_face, ahead=None):
        trainer.use_vllm = False
        ids, _ = write(prompt_ids, by_hugging_face)
        trainer.use_vllm = True
        return ids, [[-5.0] * len(row) for row in ids]

    trainer._write, trainer.use_vllm = as_an_engine, True
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert "importance_sampling_ratio" in batch and ("old_per_token_logps" in batch) == kept
    # Its own log-probs in the place of a read that was rounded otherwise: the ratio is exactly 1.
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["num_items_in_batch"])
    if not kept:
        assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]


def test_a_missing_reward_counts_for_nothing_beside_others_in_evaluations_too(tiny_run, tmp_path, in_root):
    plain = [o for o in tiny_run[1:] if not o.startswith("student_model")]
    rewards = "reward_functions=[rlt.rewards.exact.exact_answer,test_training.of_another_task]"
    data = "dataset_id_or_path=reasoning_gym/gcd"
    plan = make_plan(config_of("run_cfg=grpo_exact", *plain, data, rewards, "max_steps=1", f"output_dir={tmp_path}"))
    prepare_output(plan.config)
    run_plan(plan)
    evaluated = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert evaluated["reward"] == evaluated["exact_answer"]
    assert "answer" not in evaluated


KEEP_BEST = ["load_best_model_at_end=true", "greater_is_better=false", "save_steps=1", "eval_steps=1"]


def test_a_run_whose_folder_was_moved_still_finds_its_best_checkpoint(tiny_run, tmp_path, in_root):
    """The reward is said to be better when it is lower, so that the first step, the least trained, stays the best."""
    run = [*tiny_run, *KEEP_BEST, "learning_rate=1e-2"]

    def life(folder, steps: int):
        trainer, _ = build(run, folder, f"max_steps={steps}", "save_total_limit=2")
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer

    first = life(tmp_path / "first", 2).state
    best = f"checkpoint-{first.best_global_step}"
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = life(tmp_path / "moved", 2)
    assert Path(moved.state.best_model_checkpoint) == tmp_path / "moved" / best
    assert moved.state.best_metric == first.best_metric
    wanted = load_file(tmp_path / "moved" / best / "model.safetensors")
    assert all(torch.equal(p, wanted[n]) for n, p in moved.model.named_parameters() if n in wanted)
    # Of a copy, the original's is not touched, though it is there.
    (tmp_path / "moved").rename(tmp_path / "first")
    assert Path(life(tmp_path / "copy", 2).state.best_model_checkpoint) == tmp_path / "copy" / best


def test_a_best_checkpoint_that_is_gone_is_said_and_forgotten(tiny_run, tmp_path, in_root, caplog):
    folder = tmp_path / "run"
    trainer, _ = build([*tiny_run, *KEEP_BEST], folder, "max_steps=2")
    trainer.train()
    state_file = folder / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state |= {"best_global_step": 1, "best_metric": -1e9, "best_model_checkpoint": str(folder / "checkpoint-1")}
    state_file.write_text(json.dumps(state))
    shutil.rmtree(folder / "checkpoint-1", ignore_errors=True)
    again, _ = build([*tiny_run, *KEEP_BEST], folder, "max_steps=3")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "checkpoint-1, the best checkpoint so far, is gone" in caplog.text
    assert again.state.best_global_step == 3


def test_the_gradient_scaler_of_fp16_is_part_of_a_checkpoint(tiny_run, tmp_path, in_root):
    """A real scaler on the CPU, which doubles its scale at every step: 2**10, 2**11, 2**12, ..."""

    def life(folder, steps: int):
        trainer, _ = build(tiny_run, folder, f"max_steps={steps}", "eval_size=0", "save_steps=1")
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer

    straight = life(tmp_path / "straight", 3)
    assert life(tmp_path / "broken", 2).accelerator.scaler.get_scale() == 2.0**12
    resumed = life(tmp_path / "broken", 3)
    assert resumed.accelerator.scaler.get_scale() == straight.accelerator.scaler.get_scale() == 2.0**13
    for name, parameter in parameters_of(straight.model).items():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name])


SEEN: list[dict] = []


def of_own_columns(completions, question, tests, data_prompt, **_) -> list[float]:
    """A reward that looks at columns of the user's file."""
    values = zip(question, tests, data_prompt, strict=True)
    SEEN.extend({"question": q, "tests": t, "data_prompt": p} for q, t, p in values)
    return [0.0] * len(completions)


def test_own_columns_reach_a_reward_function_with_their_types_in_training_and_evaluation(
    tiny_run, tmp_path, in_root, caplog
):
    tests = [3, "three", None, {"in": [1.5]}, {"out": True}, [], {}, [{"a": None}], False, 0, "", [1, "1"]]
    rows = [{"question": f"{n}?", "solution": str(n), "tests": value} for n, value in enumerate(tests)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "prompt": row["tests"]}) + "\n" for row in rows))
    plain = [o for o in tiny_run[1:] if not o.startswith("student_model")]
    more = [f"dataset_id_or_path={tmp_path / 'rows.jsonl'}", "reward_functions=[test_training.of_own_columns]"]
    run = ["run_cfg=grpo_exact", *plain, *more, "max_steps=5", f"output_dir={tmp_path / 'run'}", "eval_size=2"]
    plan = make_plan(config_of(*run))
    prepare_output(plan.config)
    SEEN.clear()
    run_plan(plan)
    wanted = {row["question"]: row["tests"] for row in rows}
    assert {seen["question"] for seen in SEEN} == wanted.keys()
    for seen in SEEN:
        (found, renamed), value = (seen["tests"], seen["data_prompt"]), wanted[seen["question"]]
        assert (found, type(found)) == (renamed, type(renamed)) == (value, type(value))
    assert "column prompt reaches reward functions as data_prompt" in caplog.text


def test_rows_can_be_taken_in_their_order(tiny_run, tmp_path, in_root):
    trainer, _ = build(tiny_run, tmp_path, "eval_size=0", "shuffle_dataset=false")
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps


def test_fewer_questions_than_a_batch_has_are_refused(tiny_run, tmp_path, in_root):
    with pytest.raises(ValueError, match="1 usable rows to train on, and a batch has 2 questions"):
        build(tiny_run, tmp_path, "eval_size=0", "dataset_size=1")


def test_the_policys_own_pass_serves_the_teachers_term(tiny_run, tmp_path, in_root):
    """Generations of two steps are made together here, so the policy's pass is needed anyway."""
    trainer, _ = build(tiny_run, tmp_path, "eval_size=0", "generation_aggregation_steps=4")
    shared, answers = trainer._teacher_log_probs, []

    def both(sequences, counted, temperature):
        values = shared(sequences, counted, temperature)
        answers.append((values, trainer._frozen_log_probs(trainer.model, sequences, counted, temperature)))
        return values

    trainer.reward.teacher_log_probs = both
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert trainer._metrics["train"]["teacher/reused_share"][0] > 0
    for ours, expected in zip(*answers[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_the_references_pass_reads_for_a_student_that_is_the_reference(tiny_run, tmp_path, in_root):
    """One pass of the reference model a batch, and the same rewards as from a pass of its own."""
    trainer, _ = build(tiny_run, tmp_path, "eval_size=0", "student_model=null", "unbias_student_log_probs_temp=0.9")
    passes, found = [], []
    trunk = trainer.ref_model.base_model.forward
    trainer.ref_model.base_model.forward = lambda *a, **k: passes.append(1) or trunk(*a, **k)
    score = trainer.reward.score_readings

    def both(readings):
        shared = score(readings)
        count = len(passes)
        trainer._batch.student_log_probs = None
        found.append((count, shared, score(readings)))
        return shared

    trainer.reward.score_readings = both
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ((count, shared, alone),) = found
    assert (count, len(passes)) == (1, 2)
    for a, b in zip(shared, alone, strict=True):
        assert a.reward == pytest.approx(b.reward, abs=1e-4)


def test_sft_trains_only_what_comes_after_the_explanation_tag(tokenizer):
    prompt = "Q <|begin_of_explanation|>\n\n"
    row = example(tokenizer, prompt, "two words\n\n<|end_of_explanation|>")
    trained = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
    assert tokenizer.decode(trained) == "two words\n\n<|end_of_explanation|><|im_end|>"
    assert len(trained) == sum(row["completion_mask"])
    assert tokenizer.decode(row["input_ids"][: -len(trained)]) == prompt


def test_the_sft_loss_is_the_mean_over_the_counted_tokens(tiny_teacher, tmp_path, in_root):
    sft = ["run_cfg=teacher_sft_tiny", "report_to=null", "bf16=false", "dataset_size=4", "train_batch_size=4"]
    more = [
        "per_device_train_batch_size=4",
        "max_steps=1",
        "lr_scheduler_type=constant",
        "warmup_steps=0",
        "logging_steps=1",
    ]
    config = config_of(*sft, *more, f"model_name_or_path={tiny_teacher}", f"output_dir={tmp_path}")
    prepare_output(config)
    trainer, _ = build_trainer(make_plan(config))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_deterministic_asks_torch_for_algorithms_without_atomics(tiny_run, tmp_path, in_root, monkeypatch):
    asked = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr("rlt.jobs.training.run", lambda *_: asked.append(torch.are_deterministic_algorithms_enabled()))
    try:
        for key in ("false", "true"):
            run_plan(make_plan(config_of(*tiny_run, f"deterministic={key}", f"output_dir={tmp_path}")))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]
