"""The types of this project's own keys; their values and comments stand in cfgs/, at the leaf.

Each class is built from the flat configuration by name. Imports nothing heavy: plan.py reads it before a run.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True)
class RunConfig:
    """What the entry point itself needs."""

    trainer: str
    run_name: str
    results_dir: str
    output_dir: str
    overwrite_output_dir: bool
    resume_from: str | None
    warmup_run: str | None
    dry_run: bool
    seed: int
    report_to: str | None
    requires: str | None


@dataclass(frozen=True)
class TrainConfig:
    """Keys of the runs that train."""

    train_batch_size: int


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    model_name_or_path: str
    model_size: float
    model_max_length: int
    trust_remote_code: bool
    attn_implementation: str
    use_peft: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: str | list
    load_in_4bit: bool
    load_in_8bit: bool
    save_merged_model: bool


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they are shown."""

    dataset_id_or_path: str
    dataset_split: str
    dataset_seed: int
    dataset_size: int | None
    eval_dataset_id_or_path: str | None
    eval_size: int
    reasoning_format: str
    use_dataset_system_prompt: bool
    max_prompt_length: int


@dataclass(frozen=True)
class GRPOKeys:
    """Keys of the GRPO profiles that are arithmetic over TRL's fields, or name a user's own code."""

    generation_aggregation_steps: int | None
    use_vllm_server: bool
    reward_functions: list | None
    answer_line: bool


@dataclass(frozen=True)
class TeacherRewardConfig:
    """The keys of `reward_cfg` (arXiv 2506.08388); commented in cfgs/trainer_cfg/reward_cfg/teacher.yaml."""

    answer_log_prob_coeff: list
    kl_penalty_reward_coeff: list
    reduction_log_prob_fn: list
    reduction_kl_fn: list
    normalize_log_prob_fn: str | None
    normalize_kl_fn: str | None
    clip_log_prob: float | None
    clip_kl: float | None
    use_schulman_kl_estimation: bool
    not_matched_penalty: float
    unbias_teacher_log_probs: bool
    unbias_student_log_probs_temp: float
    include_teacher_think_entropy: bool


@dataclass(frozen=True)
class VerifiedRewardConfig:
    """The keys of `reward_cfg: verifier`; commented in cfgs/trainer_cfg/reward_cfg/verifier.yaml."""

    answer_weight: float
    format_weight: float
    length_weight: float
    length_free: int
    verifier: str
    verifier_limit_s: float


@dataclass(frozen=True)
class StudentConfig:
    """Whose understanding is measured."""

    student_model: str | None


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are written where nothing is trained."""

    temperature: float
    top_p: float
    max_completion_length: int
    questions_at_once: int
    bf16: bool | None
    logprob_token_budget: int
    use_vllm_server: bool
    vllm_server_base_url: str | list | None
    vllm_server_timeout: float
    vllm_gpu_memory_utilization: float
    vllm_tensor_parallel_size: int
    ddp_timeout: int


@dataclass(frozen=True)
class AnswersConfig:
    """Answers to held-out questions while a student is trained (trainers/answers.py)."""

    eval_answers: int
    temperature: float
    max_completion_length: int
    verifier: str
    verifier_limit_s: float
    vllm_gpu_memory_utilization: float


@dataclass(frozen=True)
class TraceConfig:
    """Which of a teacher's traces become a student's data (collect.py)."""

    traces_per_question: int
    keep_per_question: int
    min_reward_quantile: float
    min_format_rate: float
    max_student_length: int
    near_duplicate_similarity: float


@dataclass(frozen=True)
class PairConfig:
    """Which traces are compared in preference training."""

    min_margin: float


@dataclass(frozen=True)
class PipelineConfig:
    """Runs, one after the other (pipeline.py)."""

    stages: list


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a model's answers (evaluate.py)."""

    samples_per_question: int
    pass_at: list
    compare_with: str | None
    trained_on: str | None
    verifier: str
    verifier_limit_s: float
    answer_line: bool


def pick(config: dict[str, Any], cls: type[Config]) -> Config:
    """The keys of `config` that `cls` has, as an instance of it."""
    return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})
