"""Settings of every kind of run, typed; their values and comments stand in cfgs/, at the leaf.

The plan builds one frozen object of them from the flat configuration, by name (`settings_of`). `PROFILES` is the one
table of what a `trainer` is. Imports nothing heavy: the plan reads it before a run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from rlt.errors import Refused

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


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
    deterministic: bool
    report_to: str | list[str] | None
    requires: str | None

    @property
    def profile(self) -> "Profile":
        return PROFILES[self.trainer]


@dataclass(frozen=True)
class TrainConfig:
    """Keys of the runs that train. Names that TRL's configurations have too mean what they mean there."""

    train_batch_size: int
    per_device_train_batch_size: int
    learning_rate: float
    max_grad_norm: float
    max_steps: int
    num_train_epochs: float
    gradient_checkpointing: bool
    bf16: bool | None
    eval_steps: float | None
    save_steps: float
    save_minutes: float | None
    stop_grace_s: float
    save_total_limit: int | None
    trl: Mapping[str, Any]  # the keys of the run that name fields of its TRL configuration, as they are given


@dataclass(frozen=True)
class ModelKeys:
    """How a model is held and trained."""

    model_size: float
    model_max_length: int
    trust_remote_code: bool
    attn_implementation: str
    use_peft: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: str | list[str]
    load_in_4bit: bool
    load_in_8bit: bool
    save_merged_model: bool


@dataclass(frozen=True)
class ModelConfig(ModelKeys):
    """The policy."""

    model_name_or_path: str


@dataclass(frozen=True)
class SourceConfig:
    """Where rows come from, and how many of them are held out."""

    dataset_id_or_path: str
    eval_size: int


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which questions, and how they are shown."""

    dataset_split: str
    dataset_seed: int
    dataset_size: int | None
    eval_dataset_id_or_path: str | None
    reasoning_format: str
    use_dataset_system_prompt: bool
    max_prompt_length: int


@dataclass(frozen=True)
class SFTKeys:
    """Keys of supervised fine-tuning."""

    max_length: int | None
    logprob_token_budget: int | None
    curriculum: list[Any] | None
    max_surprisal: float | None
    surprising_weight: float


@dataclass(frozen=True)
class PretrainKeys:
    """Keys of pretraining: from a shape and random weights, or from a model."""

    model_name_or_path: str | None
    model_shape: dict[str, Any] | None
    max_length: int
    curriculum: list[Any] | None
    fp8: bool | str


@dataclass(frozen=True)
class PairConfig:
    """Keys of preference training, and which traces are compared in it."""

    max_length: int | None
    beta: float
    min_margin: float


@dataclass(frozen=True)
class VerifierKeys:
    """How answers are checked."""

    verifier: str
    verifier_limit_s: float


@dataclass(frozen=True)
class VerifiedRewardConfig(VerifierKeys):
    """The keys of `reward_cfg: verifier`; commented in cfgs/trainer_cfg/reward_cfg/verifier.yaml."""

    answer_weight: float
    format_weight: float
    length_weight: float
    length_free: int


@dataclass(frozen=True)
class GeneratedRewardConfig(VerifierKeys):
    """The keys of `reward_cfg: generated`; commented in cfgs/trainer_cfg/reward_cfg/generated.yaml."""

    answers_per_explanation: int
    answers_weight: float
    answers_cut: float | None
    answers_temperature: float
    answers_max_length: int


@dataclass(frozen=True)
class ResultGateConfig(VerifierKeys):
    """The keys of `reward_cfg: gated`; commented in cfgs/trainer_cfg/reward_cfg/gated.yaml."""

    wrong_result_penalty: float
    missing_result: str


@dataclass(frozen=True)
class GenerationKeys:
    """Keys of every profile that samples while it trains."""

    num_generations: int
    num_generations_eval: int
    max_completion_length: int | None
    temperature: float
    offload_untrained_models: bool
    logprob_token_budget: int | None
    save_completions_probability: float
    use_vllm: bool
    use_vllm_server: bool
    weight_transfer: str
    vllm_gpu_memory_utilization: float
    vllm_enable_sleep_mode: bool
    vllm_server_timeout: float
    beta: float


@dataclass(frozen=True)
class GRPOKeys:
    """Keys of the GRPO profiles."""

    generation_aggregation_steps: int | None
    sync_ref_model: bool
    overlap_generation: bool
    reward_functions: list[str] | None
    answer_line: bool
    verified: VerifiedRewardConfig | None  # with `reward_cfg: verifier` alone


@dataclass(frozen=True)
class DistillKeys:
    """Keys of on-policy distillation."""

    teacher_model: str | None
    teacher_prompt: str
    learns_solution: bool
    divergence_top_k: int | None
    verifier: str
    verifier_limit_s: float


@dataclass(frozen=True)
class TeacherRewardConfig:
    """The keys of `reward_cfg` (arXiv 2506.08388); commented in cfgs/trainer_cfg/reward_cfg/teacher.yaml."""

    answer_log_prob_coeff: list[float]
    kl_penalty_reward_coeff: list[float]
    reduction_log_prob_fn: list[str]
    reduction_kl_fn: list[str]
    normalize_log_prob_fn: str | None
    normalize_kl_fn: str | None
    clip_log_prob: float | None
    clip_kl: float | None
    use_schulman_kl_estimation: bool
    not_matched_penalty: float
    unbias_teacher_log_probs: bool
    unbias_student_log_probs_temp: float
    include_teacher_think_entropy: bool
    top_share: float
    log_sum_exp_temperature: float


@dataclass(frozen=True)
class RewardOptions:
    """What may be done beside the paper's reward; `generated` and `gate` with the `reward_cfg` of that name alone."""

    permute_rewards: bool
    report_rsr: bool
    generated: GeneratedRewardConfig | None
    gate: ResultGateConfig | None


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
    questions_at_once: int | None
    bf16: bool | None
    logprob_token_budget: int
    use_vllm_server: bool
    vllm_server_base_url: str | list[str] | None
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
    select: str
    select_student_tokens: int | None


@dataclass(frozen=True)
class PipelineConfig:
    """Runs, one after the other (pipeline.py)."""

    stages: list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a model's answers (evaluate.py)."""

    samples_per_question: int
    pass_at: list[int]
    compare_with: str | None
    trained_on: str | None
    verifier: str
    verifier_limit_s: float
    answer_line: bool


@dataclass(frozen=True)
class PreparationConfig:
    """What is prepared, of which sources, by which engine (rlt/preparation)."""

    sources: list[Any]
    to: str
    stages: list[str]
    stage: str | None
    allow_empty_sources: bool
    engine: str
    engine_tasks: int
    engine_workers: int | None
    engine_memory_gb: int
    slurm_partition: str | None
    slurm_time: str
    slurm_options: dict[str, Any]


@dataclass(frozen=True)
class ReadConfig:
    """How public formats are read."""

    keep_calculations: bool
    answers_per_tree: int | None
    longest_line: int


@dataclass(frozen=True)
class CleanConfig:
    """Repair of text."""

    max_characters: int


@dataclass(frozen=True)
class LanguageConfig:
    """Which languages are kept."""

    languages: list[str] | None
    min_language_score: float


@dataclass(frozen=True)
class QualityConfig:
    """Rules of quality, by kind."""

    text_rules: list[str]
    chat_rules: list[str]
    max_answer_tokens: int | None


@dataclass(frozen=True)
class PiiConfig:
    """Personal data and secrets."""

    pii_entities: list[str]
    pii_style: str
    pii_names: str | None


@dataclass(frozen=True)
class ToxicityConfig:
    """How toxic a record may be."""

    toxicity_model: str
    max_toxicity: float
    toxicity_action: str


@dataclass(frozen=True)
class DuplicatesConfig:
    """Which copies are dropped."""

    same_prompt: str | int
    near_signature: str
    near_similarity: float
    near_in_group: str
    near_alarm_share: float


@dataclass(frozen=True)
class DecontaminationConfig:
    """Which evaluations no row may hold a question of."""

    evaluation_sets: list[str]
    max_contamination: float


@dataclass(frozen=True)
class SplitConfig:
    """What is held out."""

    validation_share: float


@dataclass(frozen=True)
class TokensConfig:
    """How rows become token ids, and rows of one length."""

    tokenizer: str | None
    train_tokenizer: int | None
    tokens_as: str
    reasoning_format: str
    max_prompt_length: int
    pack_length: int
    pack_buckets: list[int] | None
    pack_overflow: str | None


@dataclass(frozen=True)
class Training(RunConfig, TrainConfig, ModelKeys, SourceConfig):
    """A run that trains."""


@dataclass(frozen=True)
class PretrainSettings(Training, PretrainKeys):
    """A model learns what follows in packed texts."""


@dataclass(frozen=True)
class Tuning(Training, ModelConfig, DataConfig):
    """A run that trains a model on questions, traces or pairs."""


@dataclass(frozen=True)
class SFTSettings(Tuning, SFTKeys):
    """A teacher's warm-up: it learns to explain."""


@dataclass(frozen=True)
class StudentSettings(SFTSettings, AnswersConfig):
    """A student learns to think and answer."""


@dataclass(frozen=True)
class DPOSettings(Tuning, PairConfig):
    """A teacher learns which of its own traces is the better one."""


@dataclass(frozen=True)
class Generating(Tuning, GenerationKeys):
    """A run that trains on what the model samples."""


@dataclass(frozen=True)
class DistillSettings(Generating, DistillKeys):
    """A student learns a teacher's next-token distributions on its own samples."""


@dataclass(frozen=True)
class GRPOSettings(Generating, GRPOKeys):
    """A student learns from rewards of its answers."""


@dataclass(frozen=True)
class TeacherSettings(GRPOSettings, TeacherRewardConfig, RewardOptions, StudentConfig):
    """A teacher learns from a student's understanding."""


@dataclass(frozen=True)
class Sampling(RunConfig, ModelConfig, DataConfig, SamplingConfig):
    """A job that samples from a model."""


@dataclass(frozen=True)
class CollectSettings(Sampling, TeacherRewardConfig, RewardOptions, StudentConfig, TraceConfig):
    """A teacher's traces become a student's data."""


@dataclass(frozen=True)
class EvaluateSettings(Sampling, EvaluationConfig):
    """A model answers questions."""


@dataclass(frozen=True)
class PipelineSettings(RunConfig, PipelineConfig):
    """Runs, one after the other."""


@dataclass(frozen=True)
class PrepareSettings(
    RunConfig,
    PreparationConfig,
    ReadConfig,
    CleanConfig,
    LanguageConfig,
    QualityConfig,
    PiiConfig,
    ToxicityConfig,
    DuplicatesConfig,
    DecontaminationConfig,
    SplitConfig,
    TokensConfig,
):
    """Raw text and public formats become rows."""


@dataclass(frozen=True)
class Profile:
    """What a `trainer` does, asked wherever runs differ by it.

    Args:
        settings: the class of its settings.
        config: the TRL configuration that its other keys name fields of; None: it trains nothing itself (a job).
            trainers/build.py has one builder for each.
        generates: completions while it trains.
        learns_from: what its rows are: questions with solutions, their traces, pairs of those, or packed text.
        learner: whose answer a trace becomes.
        teaches: its completions are explanations, rewarded by a student's understanding.
        distils: a frozen teacher reads its completions; there are no rewards and no reference model.
        stages: it is a list of other runs.
        asks: its questions must not be among those that a model was trained on.
        prepares: it makes rows of sources, stage by stage, and does again what changed.
        job: the module of rlt/jobs/ that runs it.
    """

    settings: type[RunConfig]
    config: Literal["grpo", "sft", "dpo", "pretrain", "distill"] | None = None
    generates: bool = False
    learns_from: Literal["questions", "traces", "pairs", "text"] | None = None
    learner: Literal["teacher", "student"] | None = None
    teaches: bool = False
    distils: bool = False
    stages: bool = False
    asks: bool = False
    prepares: bool = False
    job: str = "training"

    @property
    def trains(self) -> bool:
        return self.config is not None

    @property
    def holds_out(self) -> bool:
        """Whether questions can be set apart, which evaluations of the run ask."""
        return self.learns_from in ("questions", "traces")


PROFILES = {
    "sft": Profile(SFTSettings, config="sft", learns_from="traces", learner="teacher"),
    "student_sft": Profile(StudentSettings, config="sft", learns_from="traces", learner="student"),
    "pretrain": Profile(PretrainSettings, config="pretrain", learns_from="text"),
    "dpo": Profile(DPOSettings, config="dpo", learns_from="pairs", learner="teacher"),
    "grpo": Profile(GRPOSettings, config="grpo", generates=True, learns_from="questions", learner="student"),
    "teacher_grpo": Profile(
        TeacherSettings, config="grpo", generates=True, learns_from="questions", learner="teacher", teaches=True
    ),
    "distill": Profile(
        DistillSettings, config="distill", generates=True, learns_from="questions", learner="student", distils=True
    ),
    "collect": Profile(CollectSettings, teaches=True, job="collect"),
    "evaluate": Profile(EvaluateSettings, asks=True, job="evaluate"),
    "pipeline": Profile(PipelineSettings, stages=True, job="pipeline"),
    "prepare": Profile(PrepareSettings, prepares=True, job="prepare"),
}
# Parts of settings that only some `reward_cfg` have: the class of each, and a key that no other part has.
REWARD_PARTS: dict[str, tuple[type, str]] = {
    "verified": (VerifiedRewardConfig, "answer_weight"),
    "generated": (GeneratedRewardConfig, "answers_per_explanation"),
    "gate": (ResultGateConfig, "wrong_result_penalty"),
}
MOVED = {"rewards.exact.exact_answer": "rlt.rewards.exact.exact_answer"}  # dotted paths in older runs' folders


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with today's names for what it names by an older one."""
    functions = config.get("reward_functions")
    return {**config, "reward_functions": [MOVED.get(path, path) for path in functions]} if functions else config


AUTO, FILES, NCCL, IPC = "auto", "files", "nccl", "ipc"  # values of weight_transfer


def server_urls(named: str | list[str] | None) -> list[str]:
    """The addresses of the servers that generate; the key takes one or a list."""
    return [named] if isinstance(named, str) else list(named or [])


def profile_of(config: dict[str, Any]) -> Profile:
    """The profile of a configuration whose keys were checked."""
    return PROFILES[config["trainer"]]


def own_keys(settings: type) -> dict[str, Any]:
    """{key: annotation} of a settings class; keys that only some of its runs have are in it too."""
    hints = get_type_hints(settings)
    keys = {field.name: hints[field.name] for field in fields(settings) if field.name not in ("trl", *REWARD_PARTS)}
    parts = [cls for part, (cls, _) in REWARD_PARTS.items() if part in hints]
    return keys | {key: kind for cls in parts for key, kind in get_type_hints(cls).items()}


def picked_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the settings whose own key is set; None for the others."""
    return {part: pick(config, cls) if key in config else None for part, (cls, key) in REWARD_PARTS.items()}


def settings_of(config: dict[str, Any], trl: Iterable[str] = ()) -> Any:
    """The settings of a flat configuration whose keys and types were checked: an instance of its profile's class.

    Args:
        trl: names of the fields that its TRL configuration has.

    Raises:
        Refused: the configuration lacks a key.
    """
    cls = profile_of(config).settings
    given: dict[str, Any] = {**config, "trl": MappingProxyType({key: config[key] for key in trl if key in config})}
    given |= picked_parts(config)
    for field in fields(cls):
        if field.name not in given:
            raise Refused(f"{field.name} is not set, and a {config['trainer']} run needs it")
    return pick(given, cls)


def pick(config: Mapping[str, Any], cls: type[Config]) -> Config:
    """The keys of `config` that `cls` has, as an instance of it."""
    return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})
