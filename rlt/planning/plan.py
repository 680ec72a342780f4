"""What a run will do, before anything heavy is loaded: batch arithmetic, memory estimate, checks across keys.

A run that cannot work is refused here in one line that names the key, its value and the values
that would do. Imports neither torch nor an engine.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from rlt.errors import Refused
from rlt.planning.checks import (
    check_batch_arithmetic,
    check_combinations,
    check_common,
    check_groups,
    check_keys,
    check_lengths,
    check_rows,
    check_sharding,
)
from rlt.planning.curriculum import check_curriculum
from rlt.planning.distill_checks import check_distillation
from rlt.planning.engine_checks import check_generation
from rlt.planning.grace import warn_of_short_grace
from rlt.planning.job_checks import check_job
from rlt.planning.machine import (
    check_data,
    check_device,
    check_disk,
    check_models_exist,
    check_servers_answer,
    count_gpus,
    gpu_memory_gib,
)
from rlt.planning.memory import estimate_memory
from rlt.planning.pretrain_checks import check_pretraining
from rlt.planning.reward_checks import check_reward, check_reward_options
from rlt.planning.trl_fields import typed_settings
from rlt.preparation.prerequisites import check_machine, describe
from rlt.prompts.styles import load_format
from rlt.runs.folder import check_comparison, check_output
from rlt.runs.hidden import holds_secret
from rlt.runs.parts import MODELS, MOST_AT_ONCE, check_parts, models_of
from rlt.runs.trackers import check_packages, check_trackers
from rlt.schema import (
    DistillSettings,
    Generating,
    GRPOSettings,
    PrepareSettings,
    PretrainSettings,
    Profile,
    SFTSettings,
    TeacherSettings,
    Tuning,
    profile_of,
    renamed,
)

SLOW_ADAPTER = 5e-6  # of learning rates

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Plan:
    """A run that was found possible: its configuration, arithmetic, estimate, and what is missing on this machine."""

    config: dict[str, Any]
    devices: int
    gpus: int
    accumulation_steps: int
    steps_per_generation: int
    memory_gib: dict[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    warms_up_first: bool = False
    sharding: str | None = None  # over its devices; None: one process, which no launcher started

    @property
    def profile(self) -> Profile:
        return profile_of(self.config)

    @cached_property
    def settings(self) -> Any:
        """The configuration as its profile's class has it, with attributes."""
        return typed_settings(self.config)

    @property
    def secrets(self) -> dict[str, Any]:
        """The values of keys that hold secrets."""
        return {key: value for key, value in self.config.items() if value and holds_secret(key)}

    def to_json(self) -> str:
        """For other processes: without its secrets, which go from one to another in the environment alone."""
        return json.dumps({**asdict(self), "config": {**self.config, **dict.fromkeys(self.secrets)}})

    def report(self) -> str:
        """The batch table and the estimate, as text."""
        c = self.config
        if self.profile.stages:
            return "\n".join(f"{number}. {s['name']}: {s['run']}" for number, s in enumerate(c["stages"], start=1))
        if self.profile.prepares:
            return describe(self.settings)
        if not self.profile.trains:
            samples = c.get("traces_per_question") or c["samples_per_question"]
            at_once = c["questions_at_once"] or f"at most {MOST_AT_ONCE}"
            return (
                f"devices              {self.devices}{'' if self.gpus else ' (CPU)'}\n"
                f"questions x answers  {c['dataset_size'] or 'all'} x {samples}, {at_once} at once"
            )
        lines = [
            f"devices                       {self.devices}{'' if self.gpus else ' (CPU)'}",
            f"rows per step                 {c['train_batch_size']}",
            f"  = per device                {c['per_device_train_batch_size']} x {self.devices} devices x "
            f"{self.accumulation_steps} accumulated",
        ]
        if self.profile.generates:
            prompts = c["train_batch_size"] // c["num_generations"]
            tokens = prompts * c["max_prompt_length"] + c["train_batch_size"] * c["max_completion_length"]
            batch = c["per_device_train_batch_size"] * self.devices * self.steps_per_generation
            lines += [
                f"prompts x completions         {prompts} x {c['num_generations']}",
                f"completions generated at once {batch} (every {self.steps_per_generation} micro-batches)",
                f"tokens per step, at most      {tokens:,}",
            ]
            if c["use_vllm_server"]:
                lines.append(f"weights to the servers        {c['weight_transfer']}")
        lines += ["memory per device, estimated (GiB, at the longest batch):"]
        lines += [f"  {phase:<27} {gib:.1f}" for phase, gib in self.memory_gib.items()]
        return "\n".join(lines)


def make_plan(
    config: dict[str, Any],
    devices: int = 1,
    warms_up_first: bool = False,
    sharding: str | None = None,
    list_missing: bool | None = None,
) -> Plan:
    """Check a resolved configuration and work out its arithmetic.

    Args:
        config: the flat configuration, interpolations resolved.
        devices: processes that train.
        warms_up_first: another run will first make the model, or the rows, that this one begins with.
        sharding: over the devices, one of `rlt.launching.environment.SHARDINGS`; None: one process.
        list_missing: put what this machine merely lacks (files, network, a GPU) into `Plan.missing` instead of
            refusing the run for it; None: as a dry run does.

    Raises:
        Refused: one line on the first thing that cannot work.
    """
    config = renamed(config)
    check_keys(config)
    check_trackers(config)
    profile, gpus = profile_of(config), count_gpus()
    if profile.trains:
        plan = _plan_of_training(config, devices, gpus, sharding)
    else:
        check_job(typed_settings(config))
        plan = Plan(config, devices, gpus, 0, 0)
    if "reasoning_format" in config:  # a pipeline's stages are planned by themselves
        load_format(config["reasoning_format"])
    plan = replace(plan, warms_up_first=warms_up_first, sharding=sharding)
    missing = _missing(plan, config["dry_run"] if list_missing is None else list_missing)
    return replace(plan, missing=tuple(missing))


def _plan_of_training(config: dict[str, Any], devices: int, gpus: int, sharding: str | None) -> Plan:
    settings, kind = typed_settings(config), sharding or "ddp"
    accumulation = check_batch_arithmetic(settings, devices)
    generation = config.get("generation_aggregation_steps") or accumulation
    if isinstance(settings, Generating):
        check_groups(settings, devices, generation)
        check_lengths(settings)
        check_generation(settings)
    if isinstance(settings, GRPOSettings):
        check_combinations(settings)
    if isinstance(settings, DistillSettings):
        check_distillation(settings)
    check_sharding(settings, devices, kind)
    if isinstance(settings, TeacherSettings):
        check_reward(settings)
        check_reward_options(settings)
    check_common(settings)
    if isinstance(settings, Tuning):
        check_rows(settings)
    if isinstance(settings, PretrainSettings):
        check_pretraining(settings)
    if isinstance(settings, PretrainSettings | SFTSettings) and settings.curriculum is not None:
        check_curriculum(settings)
    if settings.use_peft and settings.learning_rate < SLOW_ADAPTER:
        logger.warning(
            "learning_rate=%s with use_peft=true: Adam moves an adapter by at most that much a step, from zero, which "
            "is hardly seen; adapters take 1e-5 and more",
            settings.learning_rate,
        )
    warn_of_short_grace(settings, accumulation)
    memory = estimate_memory(config, gpu_memory_gib(), devices, kind)
    return Plan(config, devices, gpus, accumulation, generation, memory)


def _missing(plan: Plan, listed: bool) -> Iterator[str]:
    """What this machine lacks, or the first of it as a refusal.

    Raises:
        Refused: something is missing, and is not to be listed.
    """
    config = plan.config
    models = [key for key in MODELS if not (key == "model_name_or_path" and plan.warms_up_first)]
    there = {} if plan.warms_up_first and plan.profile.learns_from == "text" else config  # by a preparation
    checks = (
        partial(check_packages, config),
        partial(check_device, config, plan.gpus),
        partial(check_servers_answer, config),
        partial(check_data, there),
        partial(check_models_exist, {key: config[key] for key in models if config.get(key) is not None}),
        partial(_check_preparation, plan),
        partial(check_comparison, config),
        partial(check_output, config),
        partial(check_parts, config, models_of(config)),
        partial(check_disk, config),
    )
    for check in checks:
        try:
            check()
        except Refused as error:
            if not listed:
                raise
            yield str(error)


def _check_preparation(plan: Plan) -> None:
    if isinstance(plan.settings, PrepareSettings):
        check_machine(plan.settings)
