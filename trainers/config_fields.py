"""The names and types of every field of the trainers' configurations, and the values of some, as a committed table.

plan.py checks overrides against `config_fields.json`, because importing TRL to ask it takes seconds. After an upgrade:

    python -m trainers.config_fields
"""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

TABLE = Path(__file__).with_name("config_fields.json")


def base_names(annotation) -> list[str]:
    """The names of plain types that an annotation admits: `list[int] | None` gives ["NoneType", "list"]."""
    arguments = getattr(annotation, "__args__", None)
    origin = getattr(annotation, "__origin__", None)
    if arguments and (origin is None or not isinstance(origin, type)):
        return sorted({name for argument in arguments for name in base_names(argument)})
    kind = origin or annotation
    name = getattr(kind, "__name__", str(kind))
    return [name if name in ("int", "float", "str", "bool", "NoneType", "list", "dict") else "str"]


def fields_of(cls: type) -> dict[str, list[str]]:
    """{field: admitted types} of a dataclass's init fields."""
    hints = get_type_hints(cls)
    return {field.name: base_names(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def read_table() -> dict[str, dict[str, list[str]]]:
    """{trainer: {field: admitted types}}, and under "choices" {field: admitted values}."""
    return json.loads(TABLE.read_text())


def build_table() -> dict[str, dict[str, list[str]]]:
    """The table as the installed TRL has it."""
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames
    from trl import DPOConfig

    from trainers.grpo import GRPOConfig
    from trainers.sft import SFTConfig

    grpo, sft = fields_of(GRPOConfig), fields_of(SFTConfig)
    choices = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    return {
        **{"grpo": grpo, "teacher_grpo": grpo, "sft": sft, "student_sft": sft, "dpo": fields_of(DPOConfig)},
        "choices": {field: sorted(choice.value for choice in kind) for field, kind in choices.items()},
    }


def main() -> None:
    TABLE.write_text(json.dumps(build_table(), indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
