"""On-policy distillation: against TRL's own loss, by hand, resumed, with adapters, refused."""

import copy
import json
from pathlib import Path

import pandas
import pytest
import torch
import trl
from conftest import build, config_of, save_tiny
from safetensors.torch import load_file
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from rlt.errors import Refused
from rlt.logprobs import Divergence
from rlt.models.files import tensor_shapes
from rlt.planning.plan import make_plan
from rlt.planning.resolve import resolve
from rlt.prompts.distillation import distillation_prompts, read_completion
from rlt.prompts.rendering import prompt_token_ids
from rlt.prompts.styles import FORMATS
from rlt.rewards.gate import comes_to
from trainers.distillation import weigh_by_tokens

SMALL = [
    *("run_cfg=student_opd_tiny", "report_to=null", "bf16=false", "use_vllm=false", "train_batch_size=8"),
    *("per_device_train_batch_size=4", "num_generations=4", "max_completion_length=16", "dataset_size=12"),
    *("eval_size=2", "num_generations_eval=2", "learning_rate=1e-3", "max_prompt_length=512"),
]
ROW = {"question": "2 + 2?", "solution": "4"}


@pytest.fixture(scope="module")
def run(tiny_teacher, tiny_student) -> list[str]:
    return [*SMALL, f"model_name_or_path={tiny_student}", f"teacher_model={tiny_teacher}"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def assert_equal(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The prompts


def test_the_student_thinks_where_the_teacher_explains(tokenizer):
    style = FORMATS["r1"]
    prompts = distillation_prompts(tokenizer, style, ROW, "teaching", None, tokenizer)
    assert prompts.student.endswith("assistant\n<think>\n\n")
    assert prompts.teacher.endswith("assistant\n<answer>4</answer>\n\n<explanation>\n\n")


def test_the_solution_is_shown_to_the_teacher_alone(tokenizer):
    row = ROW | {"solution": "FOUR"}
    prompts = distillation_prompts(tokenizer, FORMATS["stratos"], row, "solution", None, tokenizer)
    assert "FOUR" in prompts.teacher and "FOUR" not in prompts.student
    assert prompts.teacher.endswith("assistant\n") and prompts.student.endswith("assistant\n")
    plain = distillation_prompts(tokenizer, FORMATS["stratos"], ROW, "question", None, tokenizer)
    assert plain.student == plain.teacher == prompts.student


@pytest.mark.parametrize("teacher_prompt", ["teaching", "solution", "question"])
def test_each_model_reads_its_own_chat_template(teacher_prompt, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    prompts = distillation_prompts(tokenizer, FORMATS["r1"], ROW, teacher_prompt, None, other)
    assert "<|im_start|>user" in prompts.student and "[user]" not in prompts.student
    assert "[user] " in prompts.teacher and "<|im_start|>" not in prompts.teacher


@pytest.mark.parametrize(("style", "shared"), [("r1", ["</"]), ("stratos", ["<", "|", "end", "_", "of", "_"])])
def test_the_teacher_is_read_up_to_where_the_end_tags_part(style, shared, tokenizer):
    tags = FORMATS[style]
    text = f"So 4 é.\n\n{tags.thought_tags[1]}\n\n{tags.solution_tags[0]}5"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = read_completion(tokenizer, tags, ids, "teaching", "4", comes_to)
    assert tokenizer.decode(read.teacher_ids) == "So 4 é.\n\n" + "".join(shared)
    assert [tokenizer.decode(token) for token in read.teacher_ids[-len(shared) :]] == shared
    assert read.student_ids[: len(read.teacher_ids)] == read.teacher_ids
    answer = f"{tags.thought_tags[1]}\n\n{tags.solution_tags[0]}4{tags.solution_tags[1]}<|im_end|>"
    assert tokenizer.decode(read.student_ids) == f"So 4 é.\n\n{answer}"  # not the 5 that it wrote
    alone = read_completion(tokenizer, tags, ids, "teaching", None, comes_to)
    assert alone.student_ids == alone.teacher_ids == read.teacher_ids
    other = read_completion(tokenizer, tags, ids, "teaching", "6", comes_to)  # which the thought does not come to
    assert tokenizer.decode(other.student_ids) == f"So 4 é.\n\n{tags.thought_tags[1]}\n\n{tags.solution_tags[0]}"
    whole = read_completion(tokenizer, tags, ids, "solution", "4", comes_to)
    assert whole.student_ids == whole.teacher_ids == ids


def test_a_student_that_misses_its_end_tag_is_shown_it(tokenizer):
    tags = FORMATS["stratos"]
    ids = tokenizer("It is 4.\n\n<|end_of_solution|>\n\nor 5", add_special_tokens=False)["input_ids"]
    read = read_completion(tokenizer, tags, ids, "teaching", "4", comes_to)
    assert tokenizer.decode(read.teacher_ids) == "It is 4.\n\n<|end_of_"
    assert tokenizer.decode(read.student_ids).startswith("It is 4.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>4")


def test_of_a_thought_that_is_cut_off_nothing_follows_and_one_that_ended_its_turn_is_gone_on_from(tokenizer):
    tags = FORMATS["r1"]
    cut = tokenizer("So 4", add_special_tokens=False)["input_ids"]
    assert read_completion(tokenizer, tags, cut, "teaching", "4", comes_to).student_ids == cut
    read = read_completion(tokenizer, tags, [*cut, tokenizer.eos_token_id], "teaching", "4", comes_to)
    assert tokenizer.decode(read.student_ids) == "So 4</think>\n\n<answer>4</answer><|im_end|>"
    assert tokenizer.decode(read.teacher_ids) == "So 4</"


def test_a_stroke_of_a_tag_within_a_thought_is_no_end_of_it(tokenizer):
    tags = FORMATS["r1"]
    thought = "In <b>4</b> the result is bold, so it is 4."
    ids = tokenizer(f"{thought}</think>\n\n<answer>4", add_special_tokens=False)["input_ids"]
    read = read_completion(tokenizer, tags, ids, "teaching", "4", comes_to)
    assert tokenizer.decode(read.student_ids) == f"{thought}</think>\n\n<answer>4</answer><|im_end|>"
    assert tokenizer.decode(read.teacher_ids) == f"{thought}</"


# The loss


def stock_loss(trainer, batch: dict, teacher_prompts: list[str]) -> torch.Tensor:
    """What TRL's own trainer makes of the same completions: padded rows, both models on all positions."""
    student, keep = trainer.model, batch["completion_ids"].shape[1]
    prompts = prompt_token_ids(trainer.processing_class, teacher_prompts)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])

    def read(model, ids, seen):
        ids, seen = torch.cat([ids, batch["completion_ids"]], 1), torch.cat([seen, batch["completion_mask"]], 1)
        return trl.DistillationTrainer._get_last_hidden_state(trainer, model, ids, seen, keep)

    with torch.no_grad():
        of_teacher = read(trainer.teacher, padded, mask)
    counted = torch.arange(keep)[None] < batch["asked"][:, None]
    loss, _, _ = _chunked_divergence_loss(
        read(student, batch["prompt_ids"], batch["prompt_mask"]),
        of_teacher,
        student.get_output_embeddings().weight,
        trainer.teacher.get_output_embeddings().weight,
        counted,
        trainer.beta,
        num_items_in_batch=batch["num_items_in_batch"],
        temperature=trainer.temperature,
    )
    return loss


def loss_and_gradients(model, compute) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = compute()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("teacher_prompt", ["solution", "teaching"])
def test_loss_and_gradients_behind_another_prompt_are_stock_trls(teacher_prompt, run, tmp_path, in_root):
    keys = [f"teacher_prompt={teacher_prompt}", "temperature=0.7", "eval_size=0", "per_device_train_batch_size=8"]
    keys += ["learns_solution=false"]
    trainer, _ = build([*run, *keys], tmp_path)
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    batch = trainer._prepare_inputs(rows)
    asked = [row["teacher_prompt"] for row in rows]
    for beta in (0.0, 0.5, 1.0):
        trainer.beta, trainer._divergence = beta, Divergence(beta, 0.7)
        loss, ours = loss_and_gradients(trainer.model, lambda: trainer.compute_loss(trainer.model, batch))
        expected, stock = loss_and_gradients(trainer.model, lambda: stock_loss(trainer, batch, asked))
        assert loss > 0
        assert loss == pytest.approx(expected, rel=1e-5)
        assert ((ours - stock).norm() / stock.norm()).item() < 1e-5


def test_behind_the_students_prompt_the_trainers_whole_loss_is_stock_trls(run, tmp_path, in_root):
    trainer, _ = build([*run, "teacher_prompt=question", "eval_size=0", "per_device_train_batch_size=8"], tmp_path)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.teacher_model, stock = trainer.teacher, trl.DistillationTrainer.compute_loss
    for beta in (0.0, 0.5, 1.0):
        trainer.beta, trainer._divergence = beta, Divergence(beta, trainer.temperature)
        loss, ours = loss_and_gradients(trainer.model, lambda: trainer.compute_loss(trainer.model, batch))
        expected, theirs = loss_and_gradients(trainer.model, lambda: stock(trainer, trainer.model, batch))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    said = trainer._metrics["train"]["entropy"]
    assert said[::2] == pytest.approx(said[1::2], rel=1e-5)
    trainer._divergence = Divergence(1.0, trainer.temperature, top_k=20)
    assert 0 < trainer.compute_loss(trainer.model, batch) < loss


@pytest.mark.parametrize(
    ("thought", "solution", "it_does"),
    [
        ("1 + 2 = 3. The result is 3.", "3", True),
        ("1 + 2 = 3. The result is 13.", "3", False),
        ("The result is 3, so 3 + 1 is asked. The result is 4.", "3", False),
        ("It is 3/4.", "3", False),
        ("It is 3/4.", "3/4", True),
        ("The result is -3.", "3", False),
        ("The result is -3.", "-3", True),
        ("The result is 3.5.", "3", False),
        ("The result is 3,000.", "3", False),
        ("So 9 + 12 = 21.", "9", False),
        ("So 9 + 12 = 21.", "21", True),
        ("12-3=9", "9", True),
        ("It comes to 1,250.", "1250", True),
        ("It comes to $12.", "12 dollars", True),
        ("Hence\n\nx = \\frac{1}{2}", "\\frac{1}{2}", True),
        ("", "3", False),
    ],
)
def test_whether_a_thought_comes_to_the_solution(thought, solution, it_does):
    assert comes_to(thought, solution) == it_does


@pytest.mark.parametrize("reached", [True, False])
def test_behind_a_thought_that_comes_to_it_a_student_learns_the_solution(reached, run, tokenizer, tmp_path, in_root):
    trainer, _ = build([*run, "eval_size=0", "per_device_train_batch_size=8", "temperature=0.7"], tmp_path)
    rows = next(iter(trainer.get_train_dataloader()))
    (solution,) = {row["solution"] for row in rows[:4]}
    says = f"So it is {solution}." if reached else f"So it is {solution}0."
    thought = tokenizer(says, add_special_tokens=False)["input_ids"]
    ended = [*thought, tokenizer.eos_token_id]
    trainer._generate_single_turn = lambda prompts, *_: [ended if i < 4 else thought for i in range(len(prompts))]
    trainer._log_generation(1.0, [1])
    trainer.model.train()
    batch = trainer._prepare_inputs(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    surprise, known = [], 0
    for number, row in enumerate(rows):
        answer = "<|end_of_thought|>\n\n<|begin_of_solution|>"
        answer += f"{solution}<|end_of_solution|><|im_end|>" if reached else ""
        begun = [*prompt_token_ids(tokenizer, [row["prompt"]])[0], *thought]
        assert tokenizer.decode(begun[-len(thought) - 11 : -len(thought)]) == "<|begin_of_thought|>\n\n"
        ids = [*begun, *(tokenizer(answer, add_special_tokens=False)["input_ids"] if number < 4 else [])]
        wanted = [*range(len(begun) - len(thought) - 11, len(begun) - len(thought)), *range(len(begun) + 6, len(ids))]
        logits = trainer.model(torch.tensor([ids])).logits[0, [i - 1 for i in wanted]] / 0.7
        targets = torch.tensor([ids[i] for i in wanted])
        surprise.append(-logits.log_softmax(-1).gather(-1, targets[:, None]).sum())
        known += len(wanted)
    said = {name: trainer._metrics["train"][name][-1] for name in ("divergence", "solution_surprise")}
    asked = 4 * (len(thought) + 6) + 4 * len(thought)
    assert batch["num_items_in_batch"].item() == asked + known
    assert said["solution_surprise"] == pytest.approx(sum(surprise).item() / known, rel=1e-5)
    assert loss.item() == pytest.approx((said["divergence"] * asked + sum(surprise).item()) / (asked + known), rel=1e-5)


# Runs


def test_every_parameter_moves_the_teacher_does_not_and_the_run_says_what_it_did(run, tmp_path, in_root):
    trainer, evaluation = build([*run, "max_steps=2", "save_steps=2"], tmp_path)
    student, teacher = ({n: p.clone() for n, p in m.named_parameters()} for m in (trainer.model, trainer.teacher))
    trainer.train()
    assert all(not torch.equal(student[name], p) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(teacher[name], p) for name, p in trainer.teacher.named_parameters())
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in logs if "loss" in record)
    assert first["entropy"] > 0
    assert sum("eval/accuracy" in record for record in logs) == 2
    table = pandas.read_parquet(tmp_path / "completions/step-00001.parquet")
    assert len(table) == 8 and {"question", "solution", "divergence", "entropy", "counted_tokens"} <= set(table)
    mean = (table["divergence"] * table["counted_tokens"]).sum() / table["counted_tokens"].sum()
    assert mean == pytest.approx(first["divergence"], rel=1e-5)
    asked, known = table["counted_tokens"].sum(), 8 * 11  # the start tag of each thought, all of which are cut off
    whole = (first["divergence"] * asked + first["solution_surprise"] * known) / (asked + known)
    assert first["loss"] == pytest.approx(whole, rel=1e-5)
    assert evaluation.sentence().startswith("accuracy on 2 held-out questions x 2: ")


def test_figures_of_micro_batches_become_one_mean_over_tokens():
    metrics = {"divergence": [1.0, 4.0], "asked_tokens": [1.0, 2.0], "known_tokens": [0.0, 0.0], "reward": [1.0, 2.0]}
    metrics["solution_surprise"] = [0.0, 0.0]
    weigh_by_tokens(metrics)
    assert metrics == {"divergence": [3.0], "solution_surprise": [0.0], "reward": [1.0, 2.0]}  # (1 + 2 x 4) / 3


def test_a_run_that_was_stopped_after_two_steps_ends_as_one_of_four(run, tmp_path, in_root):
    small = [*run, "save_steps=2", "max_completion_length=6", "num_generations=2", "train_batch_size=4", "eval_size=0"]
    small += ["lr_scheduler_type=constant"]  # that does not depend on how many steps are to come
    for folder, steps, start in (("straight", 4, None), ("resumed", 2, None), ("resumed", 4, "checkpoint-2")):
        trainer, _ = build([*small, f"max_steps={steps}", "per_device_train_batch_size=2"], tmp_path / folder)
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / start) if start else None)
        trainer.save_model(str(tmp_path / folder))
    assert_equal(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("own", [True, False], ids=["its base as the teacher", "another teacher"])
def test_an_adapter_learns_and_its_base_does_not(own, run, tmp_path, in_root):
    teacher = ["teacher_model=null", "teacher_prompt=solution"] if own else []
    trainer, _ = build([*run, *teacher, "use_peft=true", "lora_r=4", "max_steps=2", "learning_rate=1e-2"], tmp_path)
    assert (trainer.teacher is None) == own
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(start[name], value) != ("lora" in name), name
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["loss"] > 0 for record in logs if "loss" in record)


def test_the_own_starting_weights_are_a_teacher_that_stays(run, tmp_path, in_root):
    keys = ["teacher_model=null", "teacher_prompt=solution", "max_steps=1", "offload_untrained_models=true"]
    trainer, _ = build([*run, *keys], tmp_path)
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(start[name], p) for name, p in trainer.teacher.named_parameters())
    assert any(not torch.equal(start[name], p) for name, p in trainer.model.named_parameters())


def test_an_update_in_smaller_passes_has_the_same_gradients(run, tmp_path, in_root):
    """As after memory ran out: each pass is made twice, and its own part of the teacher's states goes with it."""
    found = []
    for name, lowered in (("whole", False), ("small", True)):
        trainer, _ = build([*run, "eval_size=0", "per_device_train_batch_size=8"], tmp_path / name)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        if lowered:
            trainer._update_budget.tokens, trainer._update_budget.lowered = 400, True
        trainer.create_optimizer()
        rows = next(iter(trainer.get_train_dataloader()))
        trainer.training_step(trainer.model, rows, None)
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert ((found[0] - found[1]).norm() / found[0].norm()).item() < 1e-5


# What is refused


def refused(*overrides: str) -> str:
    with pytest.raises(Refused) as caught:
        make_plan(config_of(*overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["beta=1.5"], "beta=1.5 must be in [0, 1]: 0 is the forward KL, 1 the reverse KL"),
        (["beta=-0.1"], "beta=-0.1"),
        (["beta=reverse"], "beta='reverse' is a str"),
        (["divergence=jsd"], "unknown key 'divergence'; did you mean divergence_top_k"),
        (["divergence_top_k=49153"], "divergence_top_k=49153 is above the 49152 tokens of the vocabulary"),
        (["divergence_top_k=0"], "divergence_top_k=0 must be positive"),
        (["teacher_prompt=both"], "teacher_prompt=both: use one of teaching, solution, question"),
        (["teacher_model=null", "teacher_prompt=question"], "nothing to learn from itself"),
        (["teacher_model=nowhere/at/all"], "teacher_model=nowhere/at/all"),
        (["temperature=0"], "sampling needs a temperature above 0"),
        (["num_generations=3"], "num_generations=3 does not divide the batch"),
        (["use_peft=true", "lora_target_modules=[lm_head]"], "leave lm_head out"),
        (["use_vllm_server=true"], "use_vllm_server=true needs vllm_server_base_url"),
        (["verifier=maths"], "verifier=maths: use one of"),
        (["eval_steps=0.5"], "eval_steps=0.5 must be a whole number of steps"),
        (["log_completions=true"], "log_completions: runs here need it as it is"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overrides, said, run, in_root, tmp_path):
    assert said in refused(*run, f"output_dir={tmp_path / 'run'}", *overrides)


def test_a_teacher_in_the_students_own_folder_is_refused(run, tiny_teacher, in_root):
    said = refused(*run, f"output_dir={tiny_teacher}")
    assert said.startswith(f"teacher_model={tiny_teacher} is in output_dir={tiny_teacher}")
    assert "another output_dir" in said


def of_other_words(folder: Path) -> Path:
    """A teacher two of whose tokens have each other's number."""
    save_tiny(other := folder / "other", seed=2)
    tokenizer_file = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer_file["model"]["vocab"]
    first, second = list(words)[100:102]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    assert tensor_shapes(other / "model.safetensors")  # of the same shapes
    return other


def test_a_teacher_with_another_vocabulary_is_refused_with_what_could_be_used(run, tmp_path, in_root):
    other = of_other_words(tmp_path)
    said = refused(*run, f"teacher_model={other}", f"output_dir={tmp_path / 'run'}")
    assert "has another vocabulary" in said and "(collect)" in said and "student's family" in said


def test_before_a_warm_up_its_own_model_tells_what_does_not_fit(tmp_path, in_root):
    def planned(*keys: str):
        given = ["run_cfg=student_opd_tiny", f"results_dir={tmp_path}", "report_to=null", *keys]
        return resolve(config_of(*given), given)

    teacher = f"teacher_model={of_other_words(tmp_path)}"
    assert planned("teacher_model=null", "teacher_prompt=solution").warmup
    with pytest.raises(Refused, match=r"has another vocabulary .* model_name_or_path=embedded/smollm2"):
        planned(teacher)
    with pytest.raises(Refused, match="divergence_top_k=49153 is above the 49152 tokens"):
        planned("teacher_model=null", "teacher_prompt=solution", "divergence_top_k=49153")


def test_a_teacher_of_another_task_is_named(run, tmp_path, in_root, caplog):
    teacher = tmp_path / "teacher"
    save_tiny(teacher, seed=2)
    asked = [*run, f"teacher_model={teacher}", f"output_dir={tmp_path / 'run'}"]
    for task, said in (("reasoning_gym/gsm_symbolic", 1), ("reasoning_gym/chain_sum/min_terms:9", 0)):
        caplog.clear()
        config = {"trainer": "sft", "run_name": "a", "output_dir": "b", "dataset_id_or_path": task}
        (teacher / "config.yaml").write_text(json.dumps(config))
        make_plan(config_of(*asked))
        assert sum(f"was trained on {task}, and" in line for line in caplog.messages) == said


def test_the_plan_has_the_batch_and_the_memory_of_the_teacher(run, tmp_path, in_root):
    def gib(*keys: str) -> dict[str, float]:
        return make_plan(config_of(*run, f"output_dir={tmp_path}", *keys)).memory_gib

    plan = make_plan(config_of(*run, f"output_dir={tmp_path}"))
    assert "prompts x completions         2 x 4" in plan.report()
    teacher = gib()["generation"] - gib("teacher_model=null", "teacher_prompt=solution", "use_peft=true")["generation"]
    waiting = gib("offload_untrained_models=true")
    assert waiting["update (policy, optimizer)"] < gib()["update (policy, optimizer)"]
    assert teacher > 0
