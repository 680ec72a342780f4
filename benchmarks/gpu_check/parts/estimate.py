"""The plan's memory estimate against the peak of two updates: full fine-tuning with gradient checkpointing.

Supervised, because an update is the same as GRPO's but for what is generated, and rows have about the length that the
estimate reckons with.
"""

import json
import tempfile
from pathlib import Path

from benchmarks.gpu_check.random_models import save_model, tokenizer_of, write_rows
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runs import plan_of, train_and_measure
from benchmarks.gpu_check.sizes import Shape, Sizes
from rlt.prompts.rendering import prompt_token_ids, render_teacher_prompt
from rlt.prompts.styles import load_format

ROWS = 2  # of a micro-batch
COUNT = 4 * ROWS
END = 64  # tokens at most: what stands behind a trace, byte by byte
FACTOR = 1.5  # either way


def longest_prompt(rows: Path, vocabulary: int) -> int:
    """Tokens of the longest teacher's prompt."""
    tokenizer, style = tokenizer_of(vocabulary), load_format("stratos")
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    prompts = [render_teacher_prompt(tokenizer, style, row["question"], row["solution"]) for row in read]
    return max(map(len, prompt_token_ids(tokenizer, prompts)))


def measure(shape: Shape, sizes: Sizes, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, rows = save_model(shape, place / "model", device, seed=0), place / "rows.jsonl"
        write_rows(rows, COUNT, 1)
        prompt = longest_prompt(rows, shape.vocabulary)
        write_rows(rows, COUNT, sizes.train_tokens - prompt - END)
        plan = plan_of(
            place / "run",
            *("run_cfg=teacher_sft_tiny", "max_steps=2", "lr_scheduler_type=constant", "warmup_steps=0"),
            *("use_peft=false", "optim=adamw_torch_fused", "gradient_checkpointing=true"),
            *(f"model_name_or_path={model}", f"dataset_id_or_path={rows}", f"max_prompt_length={prompt}"),
            *(f"max_length={sizes.train_tokens}", "logprob_token_budget=null"),
            *(f"train_batch_size={ROWS}", f"per_device_train_batch_size={ROWS}"),
        )
        trainer, figures = train_and_measure(plan, device)
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    return {**figures, "longest_row": longest, "row_of_the_estimate": sizes.train_tokens}


def run(record: Record, sizes: Sizes, device: str) -> None:
    for name, shape in sizes.estimate.items():
        record.add(**{name: measure(shape, sizes, device)})
        if device == "cuda":
            ratio = record.values[name]["estimate_by_peak"]
            record.claim(f"{name}: estimate within a factor of {FACTOR} of the peak", 1 / FACTOR < ratio < FACTOR)
