"""The configuration of a plan's trainer: keys that name its fields, and what follows from others."""

from typing import Any, TypeVar

from transformers import TrainingArguments

from rlt.errors import Refused
from rlt.models.devices import device_type, uses_bfloat16
from rlt.planning.memory import token_budget
from rlt.planning.plan import Plan
from rlt.planning.trl_fields import read_table
from rlt.schema import Generating, GRPOSettings, Training
from trainers.tracking import tracker_arguments

ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)


def trainer_arguments(plan: Plan) -> dict[str, Any]:
    """Every key that names a field of the trainer's configuration, and those that follow from others."""
    settings: Training = plan.settings
    arguments = {
        **settings.trl,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "bf16": uses_bfloat16(settings.bf16),
        **tracker_arguments(plan.config),
        "use_cpu": device_type() == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device_type() != "cpu",
        "save_strategy": "steps",
    }
    # Pushed once, at the end, by rlt/runs/hub.py; and what a trainer does not know it cannot save.
    arguments |= {"push_to_hub": False, "hub_token": None}
    if "logprob_token_budget" in read_table()[str(plan.profile.config)]:
        arguments["logprob_token_budget"] = token_budget(plan.config)
    if not plan.profile.generates and settings.eval_size and settings.eval_steps:
        arguments["eval_strategy"] = "steps"
    if isinstance(settings, GRPOSettings):
        arguments["steps_per_generation"] = plan.steps_per_generation
    if isinstance(settings, Generating):
        assert settings.max_completion_length is not None  # the plan refuses it
        arguments.pop("load_best_model_at_end", None)  # see keep_best
        arguments |= {
            "vllm_mode": "server" if settings.use_vllm_server else "colocate",
            "vllm_max_model_length": settings.max_prompt_length + settings.max_completion_length,
            "vllm_enable_sleep_mode": settings.vllm_enable_sleep_mode and device_type() == "cuda",
        }
    return arguments


def trl_config(cls: type[ArgumentsT], plan: Plan, **more: Any) -> ArgumentsT:
    """The configuration of a plan's trainer.

    Raises:
        Refused: TRL or transformers find that its keys do not go together.
    """
    try:
        return cls(**trainer_arguments(plan), **more)
    except ValueError as error:
        raise Refused(str(error)) from error


def keep_best(arguments: Any, settings: Training, metric: str = "reward") -> None:
    """Set after the fact, because `TrainingArguments` asks for evaluations of TRL's own kind."""
    if settings.trl.get("load_best_model_at_end"):
        arguments.load_best_model_at_end = True
        arguments.metric_for_best_model = arguments.metric_for_best_model or metric
        arguments.greater_is_better = arguments.greater_is_better is not False
