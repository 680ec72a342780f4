"""On-policy distillation from a plan: rows with both prompts, the frozen teacher, the trainer."""

from collections import Counter

from transformers import PreTrainedModel

from backends.collective import let_fsdp_run_on_cpu
from rlt.data.sources import say_dropped
from rlt.errors import Refused
from rlt.models.devices import device_type, uses_bfloat16
from rlt.models.loading import load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.planning.distill_checks import another_vocabulary
from rlt.planning.plan import Plan
from rlt.prompts.distillation import distillation_prompts
from rlt.prompts.rendering import prompt_token_ids, render_question
from rlt.prompts.rows import question_rows, student_system
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.verifiers import check_rows
from rlt.schema import DistillSettings
from rlt.survival.host_memory import ReturnFreedMemory
from trainers.answers import SampledAnswers
from trainers.arguments import keep_best, trl_config
from trainers.configs import DistillationConfig
from trainers.distillation import DistillationTrainer
from trainers.examples import as_dataset, check_enough_questions, split_rows, with_all_columns
from trainers.held_out import HeldOutEvaluation
from trainers.outputs import DistilledCompletions, leave_rows
from trainers.policies import build_frozen, build_policy, check_embedding, tokenizer_and_style


def build_distillation(plan: Plan):
    settings: DistillSettings = plan.settings
    tokenizer, style = tokenizer_and_style(settings)
    train_rows, eval_rows = split_rows(settings, style)
    teacher_tokenizer = tokenizer_of_teacher(settings, tokenizer)
    asked = with_all_columns(rows_with_prompts(settings, train_rows, tokenizer, style, teacher_tokenizer))
    held_out = held_out_rows(settings, eval_rows, tokenizer, style)
    # Before the arguments, once which exist ZeRO-3 shards whatever is loaded: each device reads with a whole teacher.
    teacher = build_teacher(settings, tokenizer)
    arguments = trl_config(DistillationConfig, plan)
    check_enough_questions(asked, settings.train_batch_size, settings.num_generations)
    keep_best(arguments, settings, "accuracy")
    let_fsdp_run_on_cpu()
    policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    check_top_k(settings, policy)
    if adapter is not None and settings.use_vllm:
        check_embedding(policy, settings.lora_target_modules)
    answers = SampledAnswers(settings, style, arguments.ddp_timeout)
    evaluation = HeldOutEvaluation(held_out, settings.output_dir, answers)
    completions = DistilledCompletions(settings.output_dir, settings.save_completions_probability)
    dtype = "bfloat16" if uses_bfloat16(settings.bf16) else "float32"
    trainer = DistillationTrainer(
        teacher=teacher,
        style=style,
        teacher_prompt=settings.teacher_prompt,
        learns_solution=settings.learns_solution and settings.teacher_prompt == "teaching",
        engine_dtype=dtype if device_type() == "cpu" else "auto",
        model=policy,
        args=arguments,
        train_dataset=as_dataset(asked),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[ReturnFreedMemory(), completions, evaluation],  # in this order
    )
    completions.trainer = evaluation.trainer = trainer
    leave_rows(trainer, train_rows, eval_rows)
    return trainer, evaluation


def rows_with_prompts(
    settings: DistillSettings, rows: list[dict], tokenizer, style: ReasoningFormat, teacher_tokenizer
) -> list[dict]:
    """Rows with the student's `prompt` and the `teacher_prompt`; those of which one is too long are left out.

    Raises:
        Refused: none is left.
    """
    kept, dropped = [], Counter()
    for row in rows:
        system = student_system(row, settings)
        prompts = distillation_prompts(tokenizer, style, row, settings.teacher_prompt, system, teacher_tokenizer)
        both = prompt_token_ids(tokenizer, [prompts.student, prompts.teacher])
        if max(map(len, both)) > settings.max_prompt_length:
            dropped[f"prompt longer than max_prompt_length={settings.max_prompt_length}"] += 1
        else:
            kept.append({**row, "prompt": prompts.student, "teacher_prompt": prompts.teacher})
    say_dropped(dropped, settings.dataset_id_or_path)
    if not kept:
        raise Refused(f"dataset_id_or_path={settings.dataset_id_or_path}: no usable row, {dict(dropped)}")
    return kept


def held_out_rows(settings: DistillSettings, rows: list[dict], tokenizer, style: ReasoningFormat) -> list[dict]:
    """Held-out questions as a student is asked them, without a begun thought."""
    if not rows:
        return []

    def render(tokenizer, row, data):
        return render_question(tokenizer, style, row["question"], student_system(row, data))

    check_rows(settings.verifier, rows)
    return question_rows(rows, tokenizer, settings, render)


def tokenizer_of_teacher(settings: DistillSettings, tokenizer):
    """With its own chat template; the student's where the student is its own teacher.

    Raises:
        Refused: its vocabulary is not the student's.
    """
    if settings.teacher_model is None:
        return tokenizer
    theirs = load_tokenizer(resolve_model_path(settings.teacher_model), settings.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise Refused(another_vocabulary(settings, len(theirs), len(tokenizer)))
    return theirs


def build_teacher(settings: DistillSettings, tokenizer) -> PreTrainedModel | None:
    """The frozen teacher in the dtype of forward passes; None where the student's base under its adapter is it."""
    if settings.teacher_model is None and settings.use_peft:
        return None
    return build_frozen(resolve_model_path(settings.teacher_model or settings.model_name_or_path), tokenizer, settings)


def check_top_k(settings: DistillSettings, policy: PreTrainedModel) -> None:
    """Where the plan could not tell, because the model's files are not on this machine then."""
    k, size = settings.divergence_top_k, policy.config.get_text_config().vocab_size
    if k is not None and k > size:
        raise Refused(f"divergence_top_k={k} is above the {size} tokens of the vocabulary: null takes all of them")
