"""The types of this project's own keys; their values and comments stand in cfgs/, at the leaf.

Each class is built from the flat configuration by name. `PROFILES` is the one table of what a `trainer` is. Imports
nothing heavy: the plan reads it before a run.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

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
    restarts: int
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


@dataclass(frozen=True)
class Profile:
    """What a `trainer` does, asked wherever runs differ by it.

    Args:
        keys: classes of this file whose fields are its keys, beside those of its TRL configuration.
        config: the TRL configuration that its other keys name fields of; None: it trains nothing itself (a job).
            trainers/build.py has one builder for each.
        generates: completions while it trains.
        learns_from: what its rows are: questions with solutions, their reasoning traces, or pairs of those.
        learner: whose answer a trace becomes.
        teaches: its completions are explanations, rewarded by a student's understanding.
        stages: it is a list of other runs.
        asks: its questions must not be among those that a model was trained on.
        job: the module of rlt/jobs/ that runs it.
    """

    keys: tuple[type, ...]
    config: Literal["grpo", "sft", "dpo"] | None = None
    generates: bool = False
    learns_from: Literal["questions", "traces", "pairs"] | None = None
    learner: Literal["teacher", "student"] | None = None
    teaches: bool = False
    stages: bool = False
    asks: bool = False
    job: str = "training"

    @property
    def trains(self) -> bool:
        return self.config is not None

    @property
    def holds_out(self) -> bool:
        """Whether questions can be set apart, which evaluations of the run ask."""
        return self.learns_from in ("questions", "traces")


TRAINING = (RunConfig, TrainConfig, ModelConfig, DataConfig)
SAMPLING = (RunConfig, ModelConfig, DataConfig, SamplingConfig)
PROFILES = {
    "sft": Profile(TRAINING, config="sft", learns_from="traces", learner="teacher"),
    "student_sft": Profile((*TRAINING, AnswersConfig), config="sft", learns_from="traces", learner="student"),
    "dpo": Profile((*TRAINING, PairConfig), config="dpo", learns_from="pairs", learner="teacher"),
    "grpo": Profile(
        (*TRAINING, GRPOKeys, VerifiedRewardConfig),
        config="grpo",
        generates=True,
        learns_from="questions",
        learner="student",
    ),
    "teacher_grpo": Profile(
        (*TRAINING, GRPOKeys, TeacherRewardConfig, StudentConfig, VerifiedRewardConfig),
        config="grpo",
        generates=True,
        learns_from="questions",
        learner="teacher",
        teaches=True,
    ),
    "collect": Profile((*SAMPLING, TeacherRewardConfig, StudentConfig, TraceConfig), teaches=True, job="collect"),
    "evaluate": Profile((*SAMPLING, EvaluationConfig), asks=True, job="evaluate"),
    "pipeline": Profile((RunConfig, PipelineConfig), stages=True, job="pipeline"),
}


def server_urls(config: dict[str, Any]) -> list[str]:
    """The addresses of the servers that generate; the key takes one or a list."""
    named = config.get("vllm_server_base_url")
    return [named] if isinstance(named, str) else list(named or [])


MOVED = {"rewards.exact.exact_answer": "rlt.rewards.exact.exact_answer"}  # dotted paths in older runs' folders


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with today's names for what it names by an older one."""
    functions = config.get("reward_functions")
    return {**config, "reward_functions": [MOVED.get(path, path) for path in functions]} if functions else config


def profile_of(config: dict[str, Any]) -> Profile:
    """The profile of a configuration whose keys were checked."""
    return PROFILES[config["trainer"]]


def pick(config: dict[str, Any], cls: type[Config]) -> Config:
    """The keys of `config` that `cls` has, as an instance of it."""
    return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})
