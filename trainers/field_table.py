"""Writes the table of the trainers' configuration fields, after an upgrade of TRL: `python -m trainers.field_table`."""

import json

from rlt.planning.trl_fields import TABLE, fields_of


def build_table() -> dict[str, dict[str, list[str]]]:
    """The table as the installed TRL has it."""
    import trl
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames
    from trl import DPOConfig

    from trainers.configs import DistillationConfig, GRPOConfig, SFTConfig

    kinds = {"grpo": GRPOConfig, "sft": SFTConfig, "dpo": DPOConfig, "pretrain": trl.SFTConfig}
    kinds |= {"distill": DistillationConfig}
    choices = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    return {
        **{name: fields_of(kind) for name, kind in kinds.items()},
        "choices": {field: sorted(choice.value for choice in kind) for field, kind in choices.items()},
    }


def main() -> None:
    TABLE.write_text(json.dumps(build_table(), indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
