"""The plan's memory estimate against the peak of two updates: full fine-tuning with gradient checkpointing.

Supervised, because an update is the same as GRPO's but for what is generated, and rows have exactly the length that the
estimate reckons with.
"""

import tempfile
from pathlib import Path

from benchmarks.gpu_check.random_models import save_model, write_rows
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runs import plan_of, train_and_measure
from benchmarks.gpu_check.sizes import Shape, Sizes

ROWS = 2  # of a micro-batch
PROMPT_TOKENS = 2000  # that a prompt has at most: its system text is cut into bytes
FACTOR = 1.5  # either way


def measure(shape: Shape, sizes: Sizes, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = save_model(shape, place / "model", device, seed=0)
        plan = plan_of(
            place / "run",
            *("run_cfg=teacher_sft_tiny", "max_steps=2", "lr_scheduler_type=constant", "warmup_steps=0"),
            *("use_peft=false", "optim=adamw_torch", "gradient_checkpointing=true", f"model_name_or_path={model}"),
            f"dataset_id_or_path={write_rows(place / 'rows.jsonl', 4 * ROWS, sizes.train_tokens - PROMPT_TOKENS)}",
            *(f"max_prompt_length={PROMPT_TOKENS}", f"max_length={sizes.train_tokens}"),
            *(f"train_batch_size={ROWS}", f"per_device_train_batch_size={ROWS}"),
            "logprob_token_budget=null",
        )
        trainer, figures = train_and_measure(plan, device)
    rows = [len(row["input_ids"]) for row in trainer.train_dataset]
    return {**figures, "longest_row": max(rows), "row_of_the_estimate": sizes.train_tokens}


def run(record: Record, sizes: Sizes, device: str) -> None:
    for name, shape in sizes.estimate.items():
        record.add(**{name: measure(shape, sizes, device)})
        if device == "cuda":
            ratio = record.values[name]["estimate_by_peak"]
            record.claim(f"{name}: estimate within a factor of {FACTOR} of the peak", 1 / FACTOR < ratio < FACTOR)
