"""From a plan to a trainer: models, tokenizer, rows, callbacks. Everything heavy is imported from here on."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from trl import DPOConfig
from trl.trainer.utils import get_callable_name, is_async_callable

from backends.collective import let_fsdp_run_on_cpu
from backends.compilation import compile_one_at_a_time
from rlt.errors import Refused
from rlt.models.devices import device_type, uses_bfloat16
from rlt.models.paths import resolve_model_path
from rlt.planning.plan import Plan
from rlt.prompts.rendering import render_question
from rlt.prompts.rows import question_rows, student_system, teaching_rows
from rlt.prompts.styles import ReasoningFormat
from rlt.prompts.tokenizers import load_student_tokenizer
from rlt.rewards.verified import verified_rewards
from rlt.rewards.verifiers import check_rows
from rlt.runs.learned import (
    check_training_rows,
)
from rlt.schema import (
    DPOSettings,
    GRPOSettings,
    SFTSettings,
    StudentSettings,
    TeacherSettings,
)
from rlt.survival.host_memory import ReturnFreedMemory
from rlt.traces.pairs import preference_pairs
from trainers.answers import HeldOutAnswers
from trainers.arguments import keep_best, trl_config
from trainers.build_distillation import build_distillation
from trainers.build_packed import build_packed_sft, build_pretraining
from trainers.configs import GRPOConfig, SFTConfig
from trainers.dpo import DPOTrainer
from trainers.examples import (
    as_dataset,
    check_enough_questions,
    question_prompt,
    say_renamed,
    sft_examples,
    split_rows,
    whole_pairs,
    with_all_columns,
)
from trainers.grpo import GRPOTrainer
from trainers.held_out import HeldOutEvaluation
from trainers.outputs import CompletionsFile, MetricsFile, Plot, ProgressBar, leave_rows
from trainers.packed import packed_files_for
from trainers.policies import build_frozen, build_policy, check_embedding, tokenizer_and_style
from trainers.sft import SFTTrainer
from trainers.teacher_grpo import TeacherGRPOTrainer
from trainers.tracking import track

NO_NUMBERS = (str, bytes, list, tuple, dict)


def build_trainer(plan: Plan):
    """The trainer of a plan, and its held-out evaluation (None for sft)."""
    compile_one_at_a_time()
    settings = plan.settings
    trainer: Any
    trainer, evaluation = BUILDERS[str(plan.profile.config)](plan)
    policy: Any = trainer.model
    for parameter in policy.parameters():
        if parameter.requires_grad:  # TRL has made bfloat16 of adapters on quantised weights, which then stand still
            parameter.data = parameter.data.float()
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    track(trainer, plan.config)
    folder = settings.output_dir
    for callback in (MetricsFile(folder), ProgressBar(), Plot(folder)):
        trainer.add_callback(callback)
    return trainer, evaluation


def build_sft(plan: Plan):
    settings: SFTSettings = plan.settings
    tokenizer, style = tokenizer_and_style(settings)
    if files := packed_files_for(settings):
        return build_packed_sft(plan, tokenizer, files)
    train_rows, eval_rows = split_rows(settings, style)
    examples = [sft_examples(settings, rows, tokenizer, style) if rows else None for rows in (train_rows, eval_rows)]
    train, evaluation = (Dataset.from_list(made) if made else None for made in examples)
    arguments = trl_config(SFTConfig, plan, completion_only_loss=True)
    let_fsdp_run_on_cpu()
    policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    trainer = SFTTrainer(
        answers=held_out_answers(settings, eval_rows, tokenizer, style),
        model=policy,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[ReturnFreedMemory()],
    )
    leave_rows(trainer, train_rows, eval_rows)
    return trainer, None


def held_out_answers(settings: SFTSettings, rows: list[dict], tokenizer, style: ReasoningFormat):
    """What answers the held-out questions at every evaluation; None where that is not asked for."""
    if not rows or not isinstance(settings, StudentSettings) or not settings.eval_answers:
        return None

    def render(tokenizer, row, data):
        return render_question(tokenizer, style, row["question"], student_system(row, data))

    check_rows(settings.verifier, rows)
    return HeldOutAnswers(settings, question_rows(rows, tokenizer, settings, render), style)


def build_dpo(plan: Plan):
    settings: DPOSettings = plan.settings
    tokenizer, style = tokenizer_and_style(settings)
    pairs = preference_pairs(Path(settings.dataset_id_or_path), settings.min_margin)
    pairs = pairs[: settings.dataset_size]
    check_training_rows(Path(settings.output_dir), pairs)
    rows = whole_pairs(settings, teaching_rows(pairs, tokenizer, style, settings).rows, tokenizer)
    arguments = trl_config(DPOConfig, plan)
    let_fsdp_run_on_cpu()
    policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    trainer = DPOTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[ReturnFreedMemory()],
    )
    leave_rows(trainer, pairs, [])
    return trainer, None


def build_grpo(plan: Plan):
    settings: GRPOSettings = plan.settings
    tokenizer, style = tokenizer_and_style(settings)
    train_rows, eval_rows = split_rows(settings, style)
    teaches = isinstance(settings, TeacherSettings)
    student_tokenizer = its_tokenizer(settings, tokenizer, style) if teaches else None

    def prepare(rows: list[dict]) -> list[dict]:
        if teaches:
            return teaching_rows(rows, tokenizer, style, settings, student_tokenizer).rows
        return question_rows(rows, tokenizer, settings, question_prompt(settings, style))

    held_out = with_all_columns(prepare(eval_rows)) if eval_rows else []
    asked = with_all_columns(prepare(train_rows))
    say_renamed(asked)
    evaluation = HeldOutEvaluation(held_out, settings.output_dir)
    completions = CompletionsFile(settings.output_dir, settings.save_completions_probability)
    teacher = teacher_arguments(settings, student_tokenizer, style) if teaches else None
    # ZeRO-3 shards what is loaded once these exist: the policy and the reference model, which TRL loads itself.
    arguments = trl_config(GRPOConfig, plan)
    assert arguments.generation_batch_size and arguments.num_generations  # the plan sets them
    check_enough_questions(asked, arguments.generation_batch_size, arguments.num_generations)
    keep_best(arguments, settings)
    functions = reward_functions(settings, style, train_rows, arguments)
    let_fsdp_run_on_cpu()
    policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    if adapter is not None and settings.use_vllm:
        check_embedding(policy, settings.lora_target_modules)
    attention = policy.config.get_text_config()._attn_implementation
    arguments.model_init_kwargs = {"attn_implementation": attention}
    cpu_dtype = "bfloat16" if uses_bfloat16(settings.bf16) else "float32"
    shared = {
        "model": policy,
        "args": arguments,
        "train_dataset": as_dataset(asked),
        "processing_class": tokenizer,
        "peft_config": adapter,
        "callbacks": [ReturnFreedMemory(), completions, evaluation],  # in this order
        "engine_dtype": cpu_dtype if device_type() == "cpu" else "auto",
    }
    if teacher is not None:
        trainer = TeacherGRPOTrainer(more_rewards=functions, **teacher, **shared)
    else:
        trainer = GRPOTrainer(reward_funcs=functions, **shared)
    completions.trainer = evaluation.trainer = trainer
    leave_rows(trainer, train_rows, eval_rows)
    return trainer, evaluation


def its_tokenizer(settings: TeacherSettings, tokenizer, style: ReasoningFormat):
    """What the student reads with; the policy's tokenizer where the reference model is the student."""
    path = student_path(settings)
    return tokenizer if path is None else load_student_tokenizer(path, tokenizer, style, settings.trust_remote_code)


def teacher_arguments(settings: TeacherSettings, student_tokenizer, style: ReasoningFormat) -> dict[str, Any]:
    """What a teacher's trainer takes beside the others': its student, its tags, its reward."""
    student = {"student": build_student(settings, student_tokenizer), "student_tokenizer": student_tokenizer}
    return {**student, "style": style, "reward_config": settings, "options": settings}


def reward_functions(
    settings: GRPOSettings, style: ReasoningFormat, rows: list[dict], arguments: GRPOConfig
) -> list[Callable]:
    """The run's functions beside the teacher's reward; weights are set where none are given."""
    functions = [of_numbers(path, load_function(path)) for path in settings.reward_functions or []]
    weights = [1.0] * (settings.profile.teaches + len(functions))
    if settings.verified:
        check_rows(settings.verified.verifier, rows)
        verified, verified_weights = verified_rewards(settings.verified, style, arguments.ddp_timeout)
        functions, weights = functions + verified, weights + verified_weights
    if arguments.reward_weights is None:
        arguments.reward_weights = weights
    return functions


def student_path(settings: TeacherSettings) -> str | None:
    """Where the student is; None when the reference model is it."""
    if settings.student_model is None:
        return None
    path = resolve_model_path(settings.student_model)
    same_weights = not (settings.sync_ref_model or settings.load_in_4bit or settings.load_in_8bit)
    if settings.beta and same_weights and path == resolve_model_path(settings.model_name_or_path):
        return None
    return path


def build_student(settings: TeacherSettings, tokenizer) -> PreTrainedModel | None:
    """The frozen student in the dtype of forward passes; None when the reference model takes its place."""
    path = student_path(settings)
    if path is None:
        return None
    return build_frozen(path, tokenizer, settings)


def load_function(path: str):
    """A reward function by its dotted path.

    Raises:
        Refused: the module has no such function.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Refused(f"reward_functions: {path!r} cannot be imported ({error})") from error


def of_numbers(path: str, function: Callable) -> Callable:
    """A reward function that is named where it returns anything but numbers.

    Raises:
        Refused: as soon as it does.
    """

    def check(rewards) -> list:
        wrong = [rewards] if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes | dict) else []
        rewards = rewards if wrong else list(rewards)
        wrong = wrong or [reward for reward in rewards if isinstance(reward, NO_NUMBERS)]
        if wrong:
            raise Refused(
                f"reward_functions: {path} returned {str(wrong[0])[:80]!r}: a list with a number for each "
                "completion is needed, or None where one has no reward"
            )
        return rewards

    async def awaited(*args, **columns):
        return check(await function(*args, **columns))

    def checked(*args, **columns):
        return check(function(*args, **columns))

    wrapper = awaited if is_async_callable(function) else checked
    wrapper.__name__ = get_callable_name(function)  # by which TRL logs it
    return wrapper


BUILDERS = {
    "sft": build_sft,
    "pretrain": build_pretraining,
    "dpo": build_dpo,
    "grpo": build_grpo,
    "distill": build_distillation,
}  # by `Profile.config`
