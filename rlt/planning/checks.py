"""What a configuration alone can tell: keys, types, batch arithmetic, lengths, combinations, the reward's lists.

plan.py calls these before it looks at the machine. Each raises a `ValueError` of one line.
"""

import difflib
import importlib.util
from typing import Any

from rlt.errors import Refused
from rlt.models.files import model_settings
from rlt.planning.engine_checks import check_engine
from rlt.planning.memory import model_folder
from rlt.planning.ranges import check_ranges
from rlt.planning.reward_checks import VERIFIED, check_functions, check_reward_weights, check_verifier
from rlt.planning.trl_fields import base_names, fields_of, read_table
from rlt.runs.hidden import secrets_in
from rlt.schema import (
    PROFILES,
    REWARD_PARTS,
    DistillSettings,
    Generating,
    GRPOSettings,
    RunConfig,
    Sampling,
    StudentConfig,
    StudentSettings,
    TeacherSettings,
    Training,
    Tuning,
    own_keys,
)

# What chooses each part of the reward.
CHOSEN_BY = {
    "verified": "a verifier's: set trainer_cfg=grpo_verifier, or teacher_grpo_verifier",
    "generated": "of the student's answers: set reward_cfg=generated",
    "gate": "of the gate: set reward_cfg=gated",
}
# Set by the plan from train_batch_size, generation_aggregation_steps and the files' own places.
DERIVED = {
    "gradient_accumulation_steps": "train_batch_size",
    "steps_per_generation": "generation_aggregation_steps",
    "generation_batch_size": "generation_aggregation_steps",
    "eval_strategy": "eval_steps",
    "full_determinism": "deterministic",
    "resume_from_checkpoint": "resume_from",
    "vllm_mode": "use_vllm_server",
    "vllm_max_model_length": "max_prompt_length and max_completion_length",
}
# Fields of TRL that a run must not set.
FIXED = frozenset(
    {
        *("hub_strategy", "hub_always_push"),
        *("chat_template_kwargs", "completion_only_loss", "dataloader_pin_memory", "disable_tqdm", "model_init_kwargs"),
        *("remove_unused_columns", "save_only_model", "save_strategy", "use_cpu"),
        *("vllm_server_host", "vllm_server_port", "vllm_structured_outputs_regex"),
    }
)
# And of those on TRL's SFT trainer, whose loss is computed here (trainers/sft.py).
SFT_FIXED = ("average_tokens_across_devices", "label_smoothing_factor", "loss_type", "packing", "padding_free")
# And those of GRPO, whose head (logprobs/head.py) and evaluations (trainers/evaluation.py) are computed here.
GRPO_FIXED = (
    *("cast_lm_head_to_fp32", "eval_delay", "eval_on_start", "use_transformers_continuous_batching"),
    *("vllm_group_port", "max_tool_calling_iterations", "log_multimodal"),  # of what no run here does
)
COMPILED = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # of a call that only pretraining makes
# And those of distillation, whose teacher and loss are of here (trainers/distillation.py).
DISTILL_FIXED = (
    *("teacher_model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision", "pad_to_multiple_of"),
    *("eval_delay", "eval_on_start", "log_completions", "max_tool_calling_iterations", "vllm_group_port"),
)
FIXED_BY_CONFIG = {
    "sft": (*SFT_FIXED, *COMPILED),
    "grpo": (*GRPO_FIXED, *COMPILED),
    "dpo": COMPILED,
    "distill": (*DISTILL_FIXED, *COMPILED),
    "pretrain": SFT_FIXED,
}


def known_keys(trainer: str) -> dict[str, list[str]]:
    """Every key of a trainer profile with the types that it admits."""
    own = {key: base_names(annotation) for key, annotation in own_keys(PROFILES[trainer].settings).items()}
    return {**read_table().get(PROFILES[trainer].config or "", {}), **own}


def key_names() -> set[str]:
    """Every key that some profile knows; train.py lets these be set without a plus sign."""
    return {key for trainer in PROFILES for key in known_keys(trainer)}


def check_secrets(config: dict[str, Any]) -> None:
    """Refuse secrets where libraries would write them down: trackers and checkpoints have all settings of a trainer.

    Raises:
        Refused: one stands in an address, or below a key. A pipeline's stages are asked one by one.
    """
    for key, value in config.items():
        if key != "stages" and (place := next(secrets_in(value, key), None)):
            raise Refused(f"{place} holds a secret, which would be written down: give it in an environment variable")


def check_keys(config: dict[str, Any]) -> None:
    """Unknown keys and wrong types are refused."""
    trainer = config.get("trainer")
    if trainer not in PROFILES:
        raise Refused(f"trainer={trainer}: use one of {', '.join(PROFILES)}")
    known = known_keys(trainer)
    check_secrets(config)
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise Refused(f"{key!r} is not a key of a {trainer} run{hint}")
        if key in DERIVED:
            raise Refused(f"{key} follows from other keys: set {DERIVED[key]} instead")
        if key in FIXED or key in FIXED_BY_CONFIG.get(PROFILES[trainer].config or "", ()):
            raise Refused(f"{key}: runs here need it as it is; leave it out")
    _check_values(config, known)
    check_ranges(config)
    check_parts_of_reward(config)
    for key, choices in read_table()["choices"].items():
        if config.get(key) not in (None, *choices):
            close = difflib.get_close_matches(str(config[key]), choices, n=3) or choices
            raise Refused(f"{key}={config[key]} does not exist: use {', '.join(close)}")
    if config["restarts"] < 0:
        raise Refused(f"restarts={config['restarts']} must not be negative; 0: a crash ends the run")


def check_parts_of_reward(config: dict[str, Any]) -> None:
    """Keys that belong to a part of the reward come with all of its keys.

    Raises:
        Refused: the part is not chosen, or only some of its keys are there.
    """
    chosen = {part: cls for part, (cls, key) in REWARD_PARTS.items() if key in config}
    complete = {key for cls in chosen.values() if not fields_of(cls).keys() - config.keys() for key in fields_of(cls)}
    for part, (cls, _) in REWARD_PARTS.items():
        if part in fields_of(PROFILES[config["trainer"]].settings):
            own = fields_of(cls).keys() - fields_of(PROFILES[config["trainer"]].settings).keys()
            if alone := config.keys() & own - complete:
                raise Refused(f"{min(alone)} is {CHOSEN_BY[part]}")


def check_types(config: dict[str, Any], classes: tuple[type, ...]) -> None:
    """Wrong types of the keys of schema classes are refused."""
    _check_values(config, {key: kinds for cls in classes for key, kinds in fields_of(cls).items()})


def _check_values(config: dict[str, Any], known: dict[str, list[str]]) -> None:
    for key, value in config.items():
        if not _admits(value, known[key]):
            kinds = " or ".join("null" if k == "NoneType" else k for k in known[key])
            raise Refused(f"{key}={value!r} is a {type(value).__name__}, it must be {kinds}")


def _admits(value: Any, kinds: list[str]) -> bool:
    name = type(value).__name__
    return name in kinds or (name == "int" and "float" in kinds)


def check_common(settings: Training) -> None:
    for key in ("learning_rate", "eval_size", "seed", "max_grad_norm"):
        if getattr(settings, key) < 0:
            raise Refused(f"{key}={getattr(settings, key)} must not be negative")
    if settings.max_steps < -1:
        raise Refused(f"max_steps={settings.max_steps}: use -1 for num_train_epochs, or a number above 0")
    if settings.max_steps <= 0 and settings.num_train_epochs <= 0:
        raise Refused(f"max_steps={settings.max_steps}: set it, or num_train_epochs, above 0")
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(settings, key) and not settings.use_peft:
            raise Refused(f"{key}=true: quantised weights cannot be trained, set use_peft=true as well")
    if settings.load_in_4bit and settings.load_in_8bit:
        raise Refused("load_in_4bit=true with load_in_8bit=true: choose one")
    if settings.trl.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise Refused("use_liger_kernel=true needs a package that is missing: pip install liger-kernel")
    if settings.trl.get("load_best_model_at_end"):
        check_best(settings)
    profile = settings.profile
    if profile.learns_from == "pairs" and settings.eval_size:
        raise Refused(f"eval_size={settings.eval_size}: preference training holds no traces out; set eval_size=0")
    if profile.learns_from in ("traces", "text") and settings.eval_size and not settings.eval_steps:
        raise Refused(f"eval_size={settings.eval_size}: rows are held out and never looked at; set eval_steps")
    every = settings.eval_steps
    if profile.generates and every and (every < 1 or every % 1):
        raise Refused(f"eval_steps={settings.eval_steps} must be a whole number of steps, or null")
    if settings.save_steps <= 0:
        raise Refused(f"save_steps={settings.save_steps} must be positive")
    if settings.save_minutes is not None and settings.save_minutes <= 0:
        raise Refused(f"save_minutes={settings.save_minutes} must be positive, or null to save by steps alone")
    if settings.stop_grace_s <= 0:
        raise Refused(f"stop_grace_s={settings.stop_grace_s} must be positive")


def check_rows(settings: Tuning) -> None:
    """Which rows are trained on, which held out, and how long their prompts may be."""
    if settings.max_prompt_length < 1:
        raise Refused(f"max_prompt_length={settings.max_prompt_length} must be positive")
    if isinstance(settings, StudentSettings) and settings.eval_answers:
        check_verifier(settings)
        if not settings.eval_size or not settings.eval_steps:
            raise Refused(f"eval_answers={settings.eval_answers} needs eval_size and eval_steps above 0")
    if not settings.profile.generates and settings.eval_dataset_id_or_path and not settings.eval_size:
        raise Refused("eval_dataset_id_or_path with eval_size=0: its rows are never looked at; set eval_size")
    size, held_out = settings.dataset_size, settings.eval_size
    if size is not None and size < 1:
        raise Refused(f"dataset_size={size} must be positive, or null for all rows")
    if size and held_out >= size and not settings.eval_dataset_id_or_path:
        raise Refused(f"eval_size={held_out} leaves nothing of dataset_size={size} rows to train on")


def check_best(settings: Training) -> None:
    """What it takes to end with the best weights."""
    profile = settings.profile
    if not profile.holds_out:
        raise Refused(f"load_best_model_at_end=true: a {settings.trainer} run ends with its last weights; unset it")
    if not settings.eval_size or not settings.eval_steps:
        raise Refused("load_best_model_at_end=true needs eval_size and eval_steps above 0")
    if not profile.generates and settings.save_steps != settings.eval_steps:  # GRPO saves when it evaluates
        raise Refused(f"save_steps={settings.save_steps} must be eval_steps={settings.eval_steps} to keep the best")
    answers = isinstance(settings, StudentSettings) and settings.eval_answers
    known = ("loss", *(("accuracy", "format_rate") if answers else ()))
    wanted = settings.trl.get("metric_for_best_model") or "loss"
    if not profile.generates and wanted.removeprefix("eval_") not in known:
        raise Refused(f"metric_for_best_model={wanted}: use {' or '.join(known)}; with eval_answers there are more")


def check_batch_arithmetic(settings: Training, devices: int) -> int:
    """Micro-batches per optimizer step."""
    total, each = settings.train_batch_size, settings.per_device_train_batch_size
    for key in ("train_batch_size", "per_device_train_batch_size"):
        if getattr(settings, key) < 1:
            raise Refused(f"{key}={getattr(settings, key)} must be positive")
    if total % (each * devices):
        fits = [d for d in range(1, total + 1) if total % (d * devices) == 0]
        remedy = f"use one of {fits}" if fits else f"train_batch_size must be a multiple of {devices} devices"
        raise Refused(
            f"per_device_train_batch_size={each} x {devices} devices does not divide train_batch_size={total}: {remedy}"
        )
    return total // (each * devices)


def check_groups(settings: Generating, devices: int, generation_steps: int) -> None:
    size = settings.num_generations
    total, batch = settings.train_batch_size, settings.per_device_train_batch_size * devices * generation_steps
    fewest = 1 if settings.profile.distils else 2  # rewards are compared within a group
    fits = [n for n in range(fewest, batch + 1) if batch % n == 0 and total % n == 0]
    if size not in fits:
        raise Refused(
            f"num_generations={size} does not divide the batch of {batch} completions generated at once "
            f"(train_batch_size={total}): use one of {fits}"
        )
    accumulation = total // (settings.per_device_train_batch_size * devices)
    if generation_steps < 1 or (accumulation % generation_steps and generation_steps % accumulation):
        raise Refused(
            f"generation_aggregation_steps={generation_steps} must divide, or be a multiple of, the {accumulation} "
            "micro-batches of a step"
        )


def _context_of(name: str | None) -> int | None:
    folder = model_folder({"model_name_or_path": name}) if name else None
    found = model_settings(folder) if folder else {}
    return found.get("text_config", found).get("max_position_embeddings")


def context_length(settings: Generating | Sampling) -> int:
    """The longest text of the model and of its student or teacher, from local folders' config.json where there are
    any."""
    own = _context_of(settings.model_name_or_path) or settings.model_max_length
    other = settings.student_model if isinstance(settings, StudentConfig) else None
    other = settings.teacher_model if isinstance(settings, DistillSettings) else other
    return min(own, _context_of(other) or own)


def check_context(settings: Generating | Sampling) -> None:
    prompt, completion, context = settings.max_prompt_length, settings.max_completion_length, context_length(settings)
    if completion is None or completion < 1:
        raise Refused(f"max_completion_length={completion} must be positive")
    other = "teacher" if isinstance(settings, DistillSettings) else "student"
    if prompt + completion > context:
        raise Refused(
            f"max_prompt_length={prompt} + max_completion_length={completion} is longer than the context of {context} "
            f"tokens, the model's or its {other}'s: max_completion_length may be up to {context - prompt}"
        )


def check_lengths(settings: Generating) -> None:
    check_context(settings)
    prompt, completion = settings.max_prompt_length, settings.max_completion_length or 0
    if settings.logprob_token_budget is not None and settings.logprob_token_budget < prompt + completion:
        raise Refused(
            f"logprob_token_budget={settings.logprob_token_budget} is smaller than the longest row, max_prompt_length="
            f"{prompt} + max_completion_length={completion}: the smallest that works is {prompt + completion}"
        )


def check_combinations(settings: GRPOSettings) -> None:
    if settings.use_peft and settings.sync_ref_model:
        raise Refused("sync_ref_model=true with use_peft=true: an adapter has no reference model to move; unset one")
    if settings.sync_ref_model and not settings.beta:
        raise Refused("sync_ref_model=true with beta=0: there is no reference model to move; set beta above 0")
    teaches = isinstance(settings, TeacherSettings)
    if isinstance(settings, TeacherSettings) and not settings.beta and settings.student_model is None:
        raise Refused("student_model=null takes the reference model, which beta=0 does not load: name a student")
    if teaches and settings.answer_line:
        raise Refused("answer_line=true: a teacher explains a solution that it is shown; unset it")
    check_engine(settings)
    if settings.verified:
        check_verifier(settings.verified)
        if not any(getattr(settings.verified, key) for key in VERIFIED.values()):
            raise Refused("answer_weight, format_weight and length_weight are all 0: there is nothing to learn")
    if settings.reward_functions or not (teaches or settings.verified):
        check_functions(settings.reward_functions)
    if (weights := settings.trl.get("reward_weights")) is not None:
        check_reward_weights(settings, weights)


def check_sharding(settings: Training, devices: int, sharding: str) -> None:
    """What several processes, or a model in shards, cannot do."""
    if devices > 1 and isinstance(settings, GRPOSettings) and settings.overlap_generation:
        raise Refused(f"overlap_generation=true with {devices} devices: it is for one process that trains")
    parallel = settings.trl.get("vllm_tensor_parallel_size", 1)
    in_process = isinstance(settings, Generating) and settings.use_vllm and not settings.use_vllm_server
    if in_process and devices % parallel:
        fits = [size for size in range(1, devices + 1) if devices % size == 0]
        raise Refused(
            f"vllm_tensor_parallel_size={parallel} does not divide the {devices} devices, whose neighbours share an "
            f"engine: use one of {fits}"
        )
    optimizer = str(settings.trl.get("optim"))
    if sharding != "ddp" and ("8bit" in optimizer or "paged" in optimizer):
        raise Refused(f"optim={optimizer} with {sharding}, which shards plain AdamW: set optim=adamw_torch, or use ddp")
    if sharding not in ("zero3", "offload", "fsdp"):
        return
    answers = settings if isinstance(settings, TeacherSettings) and settings.generated is not None else None
    if answers is not None and answers.student_model in (None, answers.model_name_or_path):
        raise Refused(
            f"reward_cfg=generated with {sharding}: the student is the reference model, whose shards cannot answer; "
            "name another student_model, or use ddp"
        )
    for key in ("load_in_4bit", "load_in_8bit", "save_merged_model"):
        if getattr(settings, key):
            raise Refused(f"{key}=true with {sharding}: its shards are of plain weights; use ddp, zero1 or zero2")


def check_server_devices(settings: RunConfig, server_devices: int) -> None:
    """Refuse servers that do not fit the run.

    Raises:
        Refused: the run is none that servers can generate for, or tensor parallelism does not fit their devices.
    """
    if settings.profile.stages:
        raise Refused("a pipeline with servers: start its stages one by one")
    if isinstance(settings, Sampling):
        parallel = settings.vllm_tensor_parallel_size
    elif isinstance(settings, Generating) and settings.use_vllm:
        parallel = settings.trl.get("vllm_tensor_parallel_size", 1)
    else:
        raise Refused(
            "use_vllm=false, or a run that does not generate, with servers: use ./launch.sh, or use_vllm=true"
        )
    fits = [size for size in range(1, server_devices + 1) if server_devices % size == 0]
    if parallel not in fits:
        raise Refused(
            f"vllm_tensor_parallel_size={parallel} does not divide the {server_devices} devices of the servers: "
            f"use one of {fits}"
        )
