"""The plan's memory estimate against real steps: two GRPO steps at the longest batch, for the optimizer's state.

Measured is the process's peak over what it holds before a model is loaded; on a GPU, the largest allocation.
"""

import json
import tempfile
from pathlib import Path

from harness import MODEL, Setting, alternate, figure, main, peak_memory_gib, rows_of, write_report

VARIANTS = {
    "full": [],
    "full_checkpointing": ["gradient_checkpointing=true"],
    "full_no_reference": ["beta=0", f"student_model={MODEL}"],
    "lora": ["use_peft=true"],
    "lora_checkpointing": ["use_peft=true", "gradient_checkpointing=true"],
}


def configuration(setting: Setting, overrides: list[str], folder: str) -> dict:
    """A tiny teacher run whose every prompt and completion is as long as the plan reckons with."""
    from rlt.models.embedded import embedded_model_path
    from rlt.models.loading import load_tokenizer
    from rlt.planning.configuration import compose_config
    from rlt.prompts.rendering import prompt_token_ids

    tokenizer = load_tokenizer(str(embedded_model_path(MODEL)))
    rows = rows_of(setting, tokenizer)
    data = Path(folder) / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({k: row[k] for k in ("question", "solution")}) + "\n" for row in rows), encoding="utf-8"
    )
    arguments = [
        f"model_name_or_path={MODEL}",
        "student_model=null",
        f"dataset_id_or_path={data}",
        f"output_dir={folder}/run",
        f"max_prompt_length={max(map(len, prompt_token_ids(tokenizer, [row['prompt'] for row in rows])))}",
        f"max_completion_length={setting.completion_tokens}",
        f"generation_kwargs={{min_new_tokens:{setting.completion_tokens}}}",
        f"num_generations={setting.generations}",
        f"train_batch_size={setting.completions}",
        f"per_device_train_batch_size={setting.micro_batch}",
        *["max_steps=2", "eval_size=0", "dataset_size=null", "use_vllm=false", "report_to=null", "save_steps=100"],
        *overrides,
    ]
    return compose_config(arguments)[0]


def worker(variant: str, setting: Setting) -> dict:
    import torch

    from rlt.models.loading import quiet_libraries
    from rlt.planning.plan import make_plan
    from rlt.runs.folder import prepare_output
    from trainers.build import build_trainer

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(configuration(setting, VARIANTS[variant], folder))
        prepare_output(plan.config)
        before = 0.0 if torch.cuda.is_available() else peak_memory_gib()
        trainer, _ = build_trainer(plan)
        trainer.train()
    return {"estimate": max(plan.memory_gib.values()), "measured": peak_memory_gib() - before}


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), list(VARIANTS), settings, 1, out)
    figures = [
        figure(
            f"{variant}_{setting}", *([run[key] for run in runs] for key in ("estimate", "measured")), "GiB", command
        )
        for (variant, setting), runs in results.items()
    ]
    return write_report(out, figures, {})


if __name__ == "__main__":
    main(__file__, worker, report, usual=["g8"])
