"""What a run will do, before anything heavy is loaded: batch arithmetic, memory estimate, checks across keys.

A run that cannot work is refused here with a `ValueError` of one line that names the key, its value and the values
that would do. Imports neither torch nor an engine.
"""

import difflib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from data.formats import load_format
from data.sources import inspect_source
from models.embedded import GGUF_FILES, is_embedded
from schema import DataConfig, GRPOKeys, ModelConfig, RunConfig, StudentConfig, TeacherRewardConfig
from trainers.config_fields import fields_of, read_table

TRAINER_KEYS: dict[str, tuple[type, ...]] = {
    "sft": (RunConfig, ModelConfig, DataConfig),
    "grpo": (RunConfig, ModelConfig, DataConfig, GRPOKeys),
    "teacher_grpo": (RunConfig, ModelConfig, DataConfig, GRPOKeys, TeacherRewardConfig, StudentConfig),
}
REDUCTIONS = ("mean", "sum", "min", "max", "median", "first_quartile", "last_quartile")
NORMALIZERS = ("none", "exp", "exp_norm")
# Set by the plan from train_batch_size, generation_aggregation_steps and the files' own places.
DERIVED = {
    "gradient_accumulation_steps": "train_batch_size",
    "steps_per_generation": "generation_aggregation_steps",
    "generation_batch_size": "generation_aggregation_steps",
    "eval_strategy": "eval_steps",
    "vllm_mode": "use_vllm_server",
}
# A run may be continued with other values of these: lengths of the run, logging, saving, devices.
CONTINUABLE = frozenset(
    "max_steps num_train_epochs logging_steps save_steps save_total_limit eval_steps report_to dry_run resume_from "
    "overwrite_output_dir save_completions_probability per_device_train_batch_size offload_untrained_models "
    "vllm_gpu_memory_utilization vllm_enable_sleep_mode logprob_token_budget save_merged_model requires results_dir "
    "output_dir run_name warmup_run gradient_checkpointing".split()
)
GIB = 2**30
NETWORK_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Plan:
    """A run that was found possible: its configuration, arithmetic, estimate, and what is missing on this machine."""

    config: dict[str, Any]
    devices: int
    gpus: int
    accumulation_steps: int
    steps_per_generation: int
    memory_gib: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    pending_warmup: str | None = None

    @property
    def is_grpo(self) -> bool:
        return self.config["trainer"] != "sft"

    def report(self) -> str:
        """The batch table and the estimate, as text."""
        c = self.config
        lines = [
            f"devices                       {self.devices}{'' if self.gpus else ' (CPU)'}",
            f"rows per step                 {c['train_batch_size']}",
            f"  = per device                {c['per_device_train_batch_size']} x {self.devices} devices x "
            f"{self.accumulation_steps} accumulated",
        ]
        if self.is_grpo:
            prompts = c["train_batch_size"] // c["num_generations"]
            tokens = prompts * c["max_prompt_length"] + c["train_batch_size"] * c["max_completion_length"]
            batch = c["per_device_train_batch_size"] * self.devices * self.steps_per_generation
            lines += [
                f"prompts x completions         {prompts} x {c['num_generations']}",
                f"completions generated at once {batch} (every {self.steps_per_generation} micro-batches)",
                f"tokens per step, at most      {tokens:,}",
            ]
        lines += ["memory per device, estimated (GiB, at the longest batch):"]
        lines += [f"  {phase:<27} {gib:.1f}" for phase, gib in self.memory_gib.items()]
        return "\n".join(lines)


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() not in ("", "-1")]) if shutil.which("nvidia-smi") else 0
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def known_keys(trainer: str) -> dict[str, list[str]]:
    """Every key of a trainer profile with the types that it admits."""
    own = {key: kinds for cls in TRAINER_KEYS[trainer] for key, kinds in fields_of(cls).items()}
    return {**read_table()[trainer], **own}


def make_plan(config: dict[str, Any], devices: int = 1, pending_warmup: str | None = None) -> Plan:
    """Check a resolved configuration and work out its arithmetic.

    Args:
        config: the flat configuration, interpolations resolved.
        devices: processes that train.
        pending_warmup: a run that will first make the model at `model_name_or_path`.

    Raises:
        ValueError: one line on the first thing that cannot work. What this machine merely lacks (files, network, a
            GPU) is in `Plan.missing` when `dry_run` is set, and raised like everything else when it is not.
    """
    check_keys(config)
    gpus = count_gpus()
    accumulation = check_batch(config, devices)
    generation = config.get("generation_aggregation_steps") or accumulation
    if config["trainer"] != "sft":
        check_groups(config, devices, generation)
        check_lengths(config)
        check_combinations(config)
    if config["trainer"] == "teacher_grpo":
        check_reward(config)
    check_common(config)
    load_format(config["reasoning_format"])
    plan = Plan(config, devices, gpus, accumulation, generation, estimate_memory(config), [], pending_warmup)
    for check in (check_device, check_data, check_models, check_output, check_disk):
        try:
            check(plan)
        except ValueError as error:
            if not config["dry_run"]:
                raise
            plan.missing.append(str(error))
    if pending_warmup and config["dry_run"]:
        plan.missing.append(f"model {config['model_name_or_path']}: warm-up {pending_warmup} would run first")
    return plan


def check_keys(config: dict[str, Any]) -> None:
    """Unknown keys and wrong types are refused."""
    trainer = config.get("trainer")
    if trainer not in TRAINER_KEYS:
        raise ValueError(f"trainer={trainer}: use one of {', '.join(TRAINER_KEYS)}")
    known = known_keys(trainer)
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"{key!r} is not a key of a {trainer} run{hint}")
        if key in DERIVED:
            raise ValueError(f"{key} follows from other keys: set {DERIVED[key]} instead")
    _check_values(config, known)


def check_types(config: dict[str, Any], classes: tuple[type, ...]) -> None:
    """Wrong types of the keys of schema classes are refused."""
    _check_values(config, {key: kinds for cls in classes for key, kinds in fields_of(cls).items()})


def _check_values(config: dict[str, Any], known: dict[str, list[str]]) -> None:
    for key, value in config.items():
        if not _admits(value, known[key]):
            kinds = " or ".join("null" if k == "NoneType" else k for k in known[key])
            raise ValueError(f"{key}={value!r} is a {type(value).__name__}, it must be {kinds}")


def _admits(value: Any, kinds: list[str]) -> bool:
    name = type(value).__name__
    return name in kinds or (name == "int" and "float" in kinds)


def check_common(config: dict[str, Any]) -> None:
    for key in ("learning_rate", "eval_size", "seed", "max_grad_norm"):
        if config[key] < 0:
            raise ValueError(f"{key}={config[key]} must not be negative")
    for key in ("max_prompt_length", "logprob_token_budget"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be positive")
    if config["max_steps"] <= 0 and config["num_train_epochs"] <= 0:
        raise ValueError(f"max_steps={config['max_steps']}: set it, or num_train_epochs, above 0")
    if config["load_in_4bit"] and not config["use_peft"]:
        raise ValueError("load_in_4bit=true: 4-bit weights cannot be trained, set use_peft=true as well")
    if config["save_steps"] <= 0:
        raise ValueError(f"save_steps={config['save_steps']} must be positive")


def check_batch(config: dict[str, Any], devices: int) -> int:
    """Micro-batches per optimizer step."""
    total, each = config["train_batch_size"], config["per_device_train_batch_size"]
    for key in ("train_batch_size", "per_device_train_batch_size"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be positive")
    if total % (each * devices):
        fits = [d for d in range(1, total + 1) if total % (d * devices) == 0]
        remedy = f"use one of {fits}" if fits else f"train_batch_size must be a multiple of {devices} devices"
        raise ValueError(
            f"per_device_train_batch_size={each} x {devices} devices does not divide train_batch_size={total}: {remedy}"
        )
    return total // (each * devices)


def check_groups(config: dict[str, Any], devices: int, generation_steps: int) -> None:
    size = config["num_generations"]
    total, batch = config["train_batch_size"], config["per_device_train_batch_size"] * devices * generation_steps
    fits = [n for n in range(2, batch + 1) if batch % n == 0 and total % n == 0]
    if size not in fits:
        raise ValueError(
            f"num_generations={size} does not divide the batch of {batch} completions generated at once "
            f"(train_batch_size={total}): use one of {fits}"
        )
    accumulation = total // (config["per_device_train_batch_size"] * devices)
    if generation_steps < 1 or (accumulation % generation_steps and generation_steps % accumulation):
        raise ValueError(
            f"generation_aggregation_steps={generation_steps} must divide, or be a multiple of, the {accumulation} "
            "micro-batches of a step"
        )


def context_length(config: dict[str, Any]) -> int:
    """The model's longest text, from a local folder's config.json where there is one."""
    path = Path(config["model_name_or_path"]).expanduser() / "config.json"
    if path.is_file():
        return json.loads(path.read_text()).get("max_position_embeddings", config["model_max_length"])
    return config["model_max_length"]


def check_lengths(config: dict[str, Any]) -> None:
    prompt, completion, context = config["max_prompt_length"], config["max_completion_length"], context_length(config)
    if completion is None or completion < 1:
        raise ValueError(f"max_completion_length={completion} must be positive")
    if prompt + completion > context:
        raise ValueError(
            f"max_prompt_length={prompt} + max_completion_length={completion} is longer than the model's context of "
            f"{context} tokens: max_completion_length may be up to {context - prompt}"
        )


def check_combinations(config: dict[str, Any]) -> None:
    if config["temperature"] <= 0:
        raise ValueError(f"temperature={config['temperature']}: sampling needs a temperature above 0, such as 0.7")
    if config["use_peft"] and config["sync_ref_model"]:
        raise ValueError("sync_ref_model=true with use_peft=true: an adapter has no reference model to move; unset one")
    if config["sync_ref_model"] and not config["beta"]:
        raise ValueError("sync_ref_model=true with beta=0: there is no reference model to move; set beta above 0")
    if config["trainer"] == "teacher_grpo" and not config["beta"] and config["student_model"] is None:
        raise ValueError("student_model=null takes the reference model, which beta=0 does not load: name a student")
    if not 0 <= config["save_completions_probability"] <= 1:
        raise ValueError(f"save_completions_probability={config['save_completions_probability']} must be in [0, 1]")
    if config["trainer"] == "grpo":
        check_functions(config["reward_functions"])


def check_functions(paths: list[str] | None) -> None:
    """Dotted paths must name a module that exists; the function itself is looked up when the run is built."""
    if not paths:
        raise ValueError("reward_functions is empty: name at least one function, such as rewards.exact.exact_answer")
    for path in paths:
        module, _, function = str(path).rpartition(".")
        try:
            found = bool(module and function) and importlib.util.find_spec(module.split(".")[0]) is not None
        except ValueError:
            found = False
        if not found:
            raise ValueError(f"reward_functions: {path!r} is not a dotted path to a function that can be imported")


def check_reward(config: dict[str, Any]) -> None:
    """Reductions, coefficients and normalisers of the teacher reward; used by score.py as well."""
    for names_key, coefficients_key in (
        ("reduction_log_prob_fn", "answer_log_prob_coeff"),
        ("reduction_kl_fn", "kl_penalty_reward_coeff"),
    ):
        names, coefficients = config[names_key], config[coefficients_key]
        for name in names:
            if name not in REDUCTIONS:
                raise ValueError(f"{names_key}: {name!r} is not a reduction; use {', '.join(REDUCTIONS)}")
        if len(names) != len(coefficients) or not names:
            raise ValueError(
                f"{coefficients_key}={coefficients} and {names_key}={names} must be of one length, at least 1"
            )
        if not all(_admits(value, ["float"]) for value in coefficients):
            raise ValueError(f"{coefficients_key}={coefficients} must hold numbers only")
    for key in ("normalize_log_prob_fn", "normalize_kl_fn"):
        if config[key] is not None and config[key] not in NORMALIZERS:
            raise ValueError(f"{key}={config[key]!r}: use null or one of {', '.join(NORMALIZERS)}")
    if config["unbias_student_log_probs_temp"] <= 0:
        raise ValueError(f"unbias_student_log_probs_temp={config['unbias_student_log_probs_temp']} must be above 0")


# What depends on this machine: raised before a run, listed by a dry run.


def check_device(plan: Plan) -> None:
    if plan.config["requires"] == "gpu" and not plan.gpus:
        raise ValueError(f"run {plan.config['run_name']} needs a GPU and none is visible (requires=null tries the CPU)")


def check_data(plan: Plan) -> None:
    config = plan.config
    for key in ("dataset_id_or_path", "eval_dataset_id_or_path"):
        source = config[key]
        if source is None:
            continue
        try:
            inspect_source(source)
        except ValueError as error:
            raise ValueError(f"{key}={source}: {error}") from None
        if not source.startswith("reasoning_gym/") and not Path(source).expanduser().exists():
            _check_hub(key, source, "datasets")
    if config["eval_dataset_id_or_path"] and config["eval_dataset_id_or_path"] == config["dataset_id_or_path"]:
        raise ValueError(
            f"eval_dataset_id_or_path={config['eval_dataset_id_or_path']}: the evaluation rows are among the training "
            "rows; name another source, or set eval_size to hold some out"
        )


def check_models(plan: Plan) -> None:
    named = {key: plan.config.get(key) for key in ("model_name_or_path", "student_model")}
    if plan.pending_warmup:
        del named["model_name_or_path"]
    check_models_exist({key: name for key, name in named.items() if name is not None})


def check_models_exist(named: dict[str, str]) -> None:
    """Each model must be embedded, a local folder, in the hub's cache, or a hub name while the hub answers."""
    for key, name in named.items():
        if is_embedded(name):
            if name not in GGUF_FILES:
                raise ValueError(f"{key}={name} is not embedded: use one of {', '.join(GGUF_FILES)}")
            continue
        path = Path(name).expanduser()
        if path.is_dir() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise ValueError(f"{key}={name}: the folder holds no model (no config.json)")
        if path.is_dir():
            continue
        if name.startswith((".", "/", "~", "results/")) or name.count("/") != 1:
            raise ValueError(f"{key}={name}: model path does not exist")
        _check_hub(key, name, "models")


def _check_hub(key: str, name: str, kind: str) -> None:
    """A hub name must be in the local cache, or the hub must answer."""
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}").is_dir():
        return
    address = urlsplit(constants.ENDPOINT)
    reason = "is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=NETWORK_TIMEOUT_S).close()
            return
        except OSError:
            reason = "is no local path, is not in the local cache, and the hub does not answer"
    raise ValueError(f"{key}={name} {reason}")


def check_output(plan: Plan) -> None:
    """The output folder must be new, or of the same run."""
    config = plan.config
    saved = Path(config["output_dir"]) / "config.yaml"
    if config["resume_from"] is not None and not Path(config["resume_from"]).is_dir():
        raise ValueError(f"resume_from={config['resume_from']} is not a checkpoint folder")
    if config["overwrite_output_dir"] or config["resume_from"] is not None:
        return
    if not saved.is_file():
        folder = Path(config["output_dir"])
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output_dir={folder} holds files that no run here wrote: choose another output_dir")
        return
    before = yaml.safe_load(saved.read_text()) or {}
    changed = [k for k in sorted({*before, *config} - CONTINUABLE) if before.get(k) != config.get(k)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"output_dir={config['output_dir']} holds a different run ({key}: {before.get(key)} there, "
            f"{config.get(key)} now): set output_dir, or overwrite_output_dir=true to delete it"
        )


def check_disk(plan: Plan) -> None:
    config = plan.config
    folder = Path(config["output_dir"]).absolute()
    while not folder.exists():
        folder = folder.parent
    trained = parameters(config) * (0.02 if config["use_peft"] else 1)
    per_checkpoint = trained * 12 + (parameters(config) * 4 if config.get("sync_ref_model") else 0)
    needed = per_checkpoint * ((config["save_total_limit"] or 5) + 1) + parameters(config) * 4
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"output_dir={config['output_dir']}: checkpoints need about {needed / GIB:.0f} GiB and {free / GIB:.0f} GiB "
            "are free: lower save_total_limit or choose another disk"
        )


def parameters(config: dict[str, Any]) -> float:
    """How many parameters the policy has: counted in a local folder's safetensors headers, else as the key says."""
    folder = Path(config["model_name_or_path"]).expanduser()
    total = 0
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(_product(shape) for shape in shapes)
    return total or config["model_size"] * 1e9


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def estimate_memory(config: dict[str, Any]) -> dict[str, float]:
    """GiB of one device by phase, from parameter counts; activations as 34 bytes x hidden size x layers per token.

    Source of the activation term: arXiv 2205.05198, eq. 1, without its quadratic part (SDPA keeps no scores).
    Sharding is not counted: this is what one device without it would hold.
    """
    size = parameters(config)
    weight_bytes = 0.55 if config["load_in_4bit"] else 2 if config["use_peft"] else 4
    trained = size * (0.02 if config["use_peft"] else 1)
    policy = size * weight_bytes + trained * 12 + (trained * 4 if config["use_peft"] else 0)
    width = (size / 12) ** (1 / 3) * 4  # hidden size x layers^(1/2) of a usual transformer, within a factor of 2
    tokens = min(config["logprob_token_budget"], config.get("max_length") or config["logprob_token_budget"])
    kept = 2 if config["gradient_checkpointing"] else 34
    update = policy + tokens * width * 24 * kept
    phases = {"update (policy, optimizer)": update / GIB}
    if config["trainer"] == "sft":
        return phases
    frozen = 0.0 if config["use_peft"] or not config["beta"] else size * 4
    student = size * 2 if config.get("student_model") else 0.0
    stays = 0.0 if config["offload_untrained_models"] else frozen + student
    phases["update (policy, optimizer)"] += stays / GIB
    phases["reference and student"] = (size * weight_bytes + frozen + student + tokens * width * 48) / GIB
    phases["generation (engine weights)"] = (size * 2 + size * weight_bytes) / GIB
    return phases


def key_names() -> set[str]:
    """Every key that some profile knows; train.py lets these be set without a plus sign."""
    return {key for trainer in TRAINER_KEYS for key in known_keys(trainer)}

