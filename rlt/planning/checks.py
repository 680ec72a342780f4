"""What a configuration alone can tell: keys, types, batch arithmetic, lengths, combinations, the reward's lists.

plan.py calls these before it looks at the machine. Each raises a `ValueError` of one line.
"""

import difflib
import importlib.util
import json
from typing import Any

from rlt.errors import Refused
from rlt.planning.memory import model_folder
from rlt.planning.trl_fields import fields_of, read_table
from rlt.schema import PROFILES, VerifiedRewardConfig, profile_of

REDUCTIONS = ("mean", "sum", "min", "max", "median", "first_quartile", "last_quartile")
VERIFIERS = ("auto", "math", "expression", "exact", "choice", "generator")
NORMALIZERS = ("none", "exp", "exp_norm")
# Set by the plan from train_batch_size, generation_aggregation_steps and the files' own places.
DERIVED = {
    "gradient_accumulation_steps": "train_batch_size",
    "steps_per_generation": "generation_aggregation_steps",
    "generation_batch_size": "generation_aggregation_steps",
    "eval_strategy": "eval_steps",
    "resume_from_checkpoint": "resume_from",
    "vllm_mode": "use_vllm_server",
    "vllm_max_model_length": "max_prompt_length and max_completion_length",
}
# Fields of TRL that a run must not set.
FIXED = frozenset(
    {
        *("chat_template_kwargs", "completion_only_loss", "dataloader_pin_memory", "disable_tqdm", "model_init_kwargs"),
        *("remove_unused_columns", "save_only_model", "save_strategy", "use_cpu"),
        *("vllm_server_host", "vllm_server_port", "vllm_structured_outputs_regex"),
    }
)
# And of those on TRL's SFT trainer, whose loss is computed here (trainers/sft.py).
SFT_FIXED = ("average_tokens_across_devices", "label_smoothing_factor", "loss_type", "packing", "padding_free")
# And those of GRPO, whose head (logprobs/head.py) and evaluations (trainers/evaluation.py) are computed here.
GRPO_FIXED = ("cast_lm_head_to_fp32", "eval_delay", "eval_on_start", "use_transformers_continuous_batching")
FIXED_BY_CONFIG = {"sft": SFT_FIXED, "grpo": GRPO_FIXED}


def known_keys(trainer: str) -> dict[str, list[str]]:
    """Every key of a trainer profile with the types that it admits."""
    own = {key: kinds for cls in PROFILES[trainer].keys for key, kinds in fields_of(cls).items()}
    return {**read_table().get(PROFILES[trainer].config or "", {}), **own}


def key_names() -> set[str]:
    """Every key that some profile knows; train.py lets these be set without a plus sign."""
    return {key for trainer in PROFILES for key in known_keys(trainer)}


def check_keys(config: dict[str, Any]) -> None:
    """Unknown keys and wrong types are refused."""
    trainer = config.get("trainer")
    if trainer not in PROFILES:
        raise Refused(f"trainer={trainer}: use one of {', '.join(PROFILES)}")
    known = known_keys(trainer)
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise Refused(f"{key!r} is not a key of a {trainer} run{hint}")
        if key in DERIVED:
            raise Refused(f"{key} follows from other keys: set {DERIVED[key]} instead")
        if key in FIXED or key in FIXED_BY_CONFIG.get(PROFILES[trainer].config, ()):
            raise Refused(f"{key}: runs here need it as it is; leave it out")
    _check_values(config, known)
    for key, choices in read_table()["choices"].items():
        if config.get(key) not in (None, *choices):
            close = difflib.get_close_matches(str(config[key]), choices, n=3) or choices
            raise Refused(f"{key}={config[key]} does not exist: use {', '.join(close)}")


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


def check_common(config: dict[str, Any]) -> None:
    for key in ("learning_rate", "eval_size", "seed", "max_grad_norm"):
        if config[key] < 0:
            raise Refused(f"{key}={config[key]} must not be negative")
    if config["max_prompt_length"] < 1:
        raise Refused(f"max_prompt_length={config['max_prompt_length']} must be positive")
    if config["max_steps"] <= 0 and config["num_train_epochs"] <= 0:
        raise Refused(f"max_steps={config['max_steps']}: set it, or num_train_epochs, above 0")
    for key in ("load_in_4bit", "load_in_8bit"):
        if config[key] and not config["use_peft"]:
            raise Refused(f"{key}=true: quantised weights cannot be trained, set use_peft=true as well")
    if config["load_in_4bit"] and config["load_in_8bit"]:
        raise Refused("load_in_4bit=true with load_in_8bit=true: choose one")
    if config.get("load_best_model_at_end"):
        check_best(config)
    profile = profile_of(config)
    if not profile.holds_out and config["eval_size"]:
        raise Refused(f"eval_size={config['eval_size']}: preference training holds no traces out; set eval_size=0")
    if config.get("eval_answers"):
        check_verifier(config)
        if not config["eval_size"] or not config["eval_steps"]:
            raise Refused(f"eval_answers={config['eval_answers']} needs eval_size and eval_steps above 0")
    if not profile.generates and config["eval_dataset_id_or_path"] and not config["eval_size"]:
        raise Refused("eval_dataset_id_or_path with eval_size=0: its rows are never looked at; set eval_size")
    if profile.learns_from == "traces" and config["eval_size"] and not config["eval_steps"]:
        raise Refused(f"eval_size={config['eval_size']}: rows are held out and never looked at; set eval_steps")
    size, held_out = config["dataset_size"], config["eval_size"]
    if size is not None and size < 1:
        raise Refused(f"dataset_size={size} must be positive, or null for all rows")
    if size and held_out >= size and not config["eval_dataset_id_or_path"]:
        raise Refused(f"eval_size={held_out} leaves nothing of dataset_size={size} rows to train on")
    every = config["eval_steps"]
    if profile.generates and every and (every < 1 or every % 1):
        raise Refused(f"eval_steps={config['eval_steps']} must be a whole number of steps, or null")
    if config["save_steps"] <= 0:
        raise Refused(f"save_steps={config['save_steps']} must be positive")


def check_best(config: dict[str, Any]) -> None:
    """What it takes to end with the best weights."""
    profile = profile_of(config)
    if not profile.holds_out:
        raise Refused(f"load_best_model_at_end=true: a {config['trainer']} run ends with its last weights; unset it")
    if not config["eval_size"] or not config["eval_steps"]:
        raise Refused("load_best_model_at_end=true needs eval_size and eval_steps above 0")
    if not profile.generates and config["save_steps"] != config["eval_steps"]:  # GRPO saves when it evaluates
        raise Refused(f"save_steps={config['save_steps']} must be eval_steps={config['eval_steps']} to keep the best")
    known = ("loss", *(("accuracy", "format_rate") if config.get("eval_answers") else ()))
    wanted = config.get("metric_for_best_model") or "loss"
    if not profile.generates and wanted.removeprefix("eval_") not in known:
        raise Refused(f"metric_for_best_model={wanted}: use {' or '.join(known)}; with eval_answers there are more")


def check_batch_arithmetic(config: dict[str, Any], devices: int) -> int:
    """Micro-batches per optimizer step."""
    total, each = config["train_batch_size"], config["per_device_train_batch_size"]
    for key in ("train_batch_size", "per_device_train_batch_size"):
        if config[key] < 1:
            raise Refused(f"{key}={config[key]} must be positive")
    if total % (each * devices):
        fits = [d for d in range(1, total + 1) if total % (d * devices) == 0]
        remedy = f"use one of {fits}" if fits else f"train_batch_size must be a multiple of {devices} devices"
        raise Refused(
            f"per_device_train_batch_size={each} x {devices} devices does not divide train_batch_size={total}: {remedy}"
        )
    return total // (each * devices)


def check_groups(config: dict[str, Any], devices: int, generation_steps: int) -> None:
    size = config["num_generations"]
    total, batch = config["train_batch_size"], config["per_device_train_batch_size"] * devices * generation_steps
    fits = [n for n in range(2, batch + 1) if batch % n == 0 and total % n == 0]
    if size not in fits:
        raise Refused(
            f"num_generations={size} does not divide the batch of {batch} completions generated at once "
            f"(train_batch_size={total}): use one of {fits}"
        )
    accumulation = total // (config["per_device_train_batch_size"] * devices)
    if generation_steps < 1 or (accumulation % generation_steps and generation_steps % accumulation):
        raise Refused(
            f"generation_aggregation_steps={generation_steps} must divide, or be a multiple of, the {accumulation} "
            "micro-batches of a step"
        )


def _context_of(name: str | None) -> int | None:
    folder = model_folder({"model_name_or_path": name}) if name else None
    found = json.loads((folder / "config.json").read_text()) if folder else {}
    return found.get("text_config", found).get("max_position_embeddings")


def context_length(config: dict[str, Any]) -> int:
    """The longest text of the model and of its student, from local folders' config.json where there are any."""
    own = _context_of(config["model_name_or_path"]) or config["model_max_length"]
    return min(own, _context_of(config.get("student_model")) or own)


def check_context(config: dict[str, Any]) -> None:
    prompt, completion, context = config["max_prompt_length"], config["max_completion_length"], context_length(config)
    if completion is None or completion < 1:
        raise Refused(f"max_completion_length={completion} must be positive")
    if prompt + completion > context:
        raise Refused(
            f"max_prompt_length={prompt} + max_completion_length={completion} is longer than the context of {context} "
            f"tokens, the model's or its student's: max_completion_length may be up to {context - prompt}"
        )


def check_lengths(config: dict[str, Any]) -> None:
    check_context(config)
    prompt, completion = config["max_prompt_length"], config["max_completion_length"]
    if config["logprob_token_budget"] is not None and config["logprob_token_budget"] < prompt + completion:
        raise Refused(
            f"logprob_token_budget={config['logprob_token_budget']} is smaller than the longest row, max_prompt_length="
            f"{prompt} + max_completion_length={completion}: the smallest that works is {prompt + completion}"
        )


def check_combinations(config: dict[str, Any]) -> None:
    if config["temperature"] <= 0:
        raise Refused(f"temperature={config['temperature']}: sampling needs a temperature above 0, such as 0.7")
    if config["use_peft"] and config["sync_ref_model"]:
        raise Refused("sync_ref_model=true with use_peft=true: an adapter has no reference model to move; unset one")
    if config["sync_ref_model"] and not config["beta"]:
        raise Refused("sync_ref_model=true with beta=0: there is no reference model to move; set beta above 0")
    teaches = profile_of(config).teaches
    if teaches and not config["beta"] and config["student_model"] is None:
        raise Refused("student_model=null takes the reference model, which beta=0 does not load: name a student")
    if not 0 <= config["save_completions_probability"] <= 1:
        raise Refused(f"save_completions_probability={config['save_completions_probability']} must be in [0, 1]")
    if teaches and config["answer_line"]:
        raise Refused("answer_line=true: a teacher explains a solution that it is shown; unset it")
    if config["overlap_generation"]:
        check_overlap(config)
    if config["use_vllm_server"] and not config.get("vllm_server_base_url"):
        raise Refused(
            "use_vllm_server=true needs vllm_server_base_url; launch_with_server.sh starts servers and sets it"
        )
    wanted = set(fields_of(VerifiedRewardConfig))
    verifies = sorted(config.keys() & wanted)
    if wanted <= config.keys():
        check_verifier(config)
        if not any(config[key] for key in ("answer_weight", "format_weight", "length_weight")):
            raise Refused("answer_weight, format_weight and length_weight are all 0: there is nothing to learn")
    elif verifies:
        raise Refused(f"{verifies[0]} is a verifier's: set trainer_cfg=grpo_verifier, or teacher_grpo_verifier")
    if config["reward_functions"] or not (teaches or verifies):
        check_functions(config["reward_functions"])


def check_overlap(config: dict[str, Any]) -> None:
    """What another process generates while this one trains is one batch off-policy, and shares the device."""
    wanted = {"use_vllm": True, "use_vllm_server": False, "vllm_enable_sleep_mode": False}
    for key, value in wanted.items():
        if config[key] != value:
            raise Refused(f"overlap_generation=true with {key}={config[key]}: set {key}={str(value).lower()}")
    if not config.get("vllm_importance_sampling_correction", True):
        raise Refused(
            "overlap_generation=true needs vllm_importance_sampling_correction=true, which accounts for older weights"
        )


def check_verifier(config: dict[str, Any]) -> None:
    if config["verifier"] not in VERIFIERS:
        raise Refused(f"verifier={config['verifier']}: use one of {', '.join(VERIFIERS)}")
    for key in ("verifier_limit_s", "length_free"):
        if config.get(key, 1) <= 0:
            raise Refused(f"{key}={config[key]} must be positive")


def check_sharding(config: dict[str, Any], devices: int, sharding: str) -> None:
    """What several processes, or a model in shards, cannot do."""
    if devices > 1 and config.get("overlap_generation"):
        raise Refused(f"overlap_generation=true with {devices} devices: it is for one process that trains")
    parallel = config.get("vllm_tensor_parallel_size", 1)
    if config.get("use_vllm") and not config["use_vllm_server"] and devices % parallel:
        fits = [size for size in range(1, devices + 1) if devices % size == 0]
        raise Refused(
            f"vllm_tensor_parallel_size={parallel} does not divide the {devices} devices, whose neighbours share an "
            f"engine: use one of {fits}"
        )
    optimizer = str(config.get("optim"))
    if sharding != "ddp" and ("8bit" in optimizer or "paged" in optimizer):
        raise Refused(f"optim={optimizer} with {sharding}, which shards plain AdamW: set optim=adamw_torch, or use ddp")
    if sharding not in ("zero3", "offload", "fsdp"):
        return
    for key in ("load_in_4bit", "load_in_8bit", "save_merged_model"):
        if config[key]:
            raise Refused(f"{key}=true with {sharding}: its shards are of plain weights; use ddp, zero1 or zero2")


def check_server_devices(config: dict[str, Any], server_devices: int) -> None:
    """Refuse servers that do not fit the run.

    Raises:
        Refused: the run is none that servers can generate for, or tensor parallelism does not fit their devices.
    """
    profile = profile_of(config)
    if profile.stages:
        raise Refused("a pipeline with servers: start its stages one by one")
    if not config.get("use_vllm", not profile.trains):
        raise Refused(f"use_vllm={config.get('use_vllm')} with servers: use ./launch.sh, or set use_vllm=true")
    parallel = config.get("vllm_tensor_parallel_size", 1)
    fits = [size for size in range(1, server_devices + 1) if server_devices % size == 0]
    if parallel not in fits:
        raise Refused(
            f"vllm_tensor_parallel_size={parallel} does not divide the {server_devices} devices of the servers: "
            f"use one of {fits}"
        )


def check_functions(paths: list[str] | None) -> None:
    """Dotted paths must name a module that exists; the function itself is looked up when the run is built."""
    if not paths:
        raise Refused("reward_functions is empty: name at least one function, such as rlt.rewards.exact.exact_answer")
    for path in paths:
        module, _, function = str(path).rpartition(".")
        try:
            found = bool(module and function) and importlib.util.find_spec(module.split(".")[0]) is not None
        except ValueError:
            found = False
        if not found:
            raise Refused(f"reward_functions: {path!r} is not a dotted path to a function that can be imported")


def check_reward(config: dict[str, Any]) -> None:
    """Reductions, coefficients and normalisers of the teacher reward; used by score.py as well."""
    for names_key, coefficients_key in (
        ("reduction_log_prob_fn", "answer_log_prob_coeff"),
        ("reduction_kl_fn", "kl_penalty_reward_coeff"),
    ):
        names, coefficients = config[names_key], config[coefficients_key]
        for name in names:
            if name not in REDUCTIONS:
                raise Refused(f"{names_key}: {name!r} is not a reduction; use {', '.join(REDUCTIONS)}")
        if len(names) != len(coefficients) or not names:
            raise Refused(
                f"{coefficients_key}={coefficients} and {names_key}={names} must be of one length, at least 1"
            )
        if not all(_admits(value, ["float"]) for value in coefficients):
            raise Refused(f"{coefficients_key}={coefficients} must hold numbers only")
    for key in ("normalize_log_prob_fn", "normalize_kl_fn"):
        if config[key] is not None and config[key] not in NORMALIZERS:
            raise Refused(f"{key}={config[key]!r}: use null or one of {', '.join(NORMALIZERS)}")
    if config["unbias_student_log_probs_temp"] <= 0:
        raise Refused(f"unbias_student_log_probs_temp={config['unbias_student_log_probs_temp']} must be above 0")
