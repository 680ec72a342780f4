"""Three GRPO steps of a teacher by the 12 GB profile, in a process that may not allocate more.

bitsandbytes is not asked for: the adapter's base stays in bfloat16 and the optimizer is plain AdamW, where the profile
has 4-bit weights and paged 8-bit AdamW. Generation is Hugging Face's.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu_check.measures import GIB
from benchmarks.gpu_check.random_models import save_model, write_rows
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runs import plan_of, train_and_measure
from benchmarks.gpu_check.sizes import Sizes

STEPS = 3
GROUP = 4


def overrides_of(folder: Path, model: str, completion_tokens: int) -> list[str]:
    return [
        *("run_cfg=teacher_rlt_tiny", "memory_cfg=12gb", "warmup_run=null"),
        *("use_peft=true", "load_in_4bit=false", "load_in_8bit=false", "optim=adamw_torch"),
        *(f"model_name_or_path={model}", "student_model=null", "use_vllm=false", f"max_steps={STEPS}"),
        f"dataset_id_or_path={write_rows(folder / 'rows.jsonl', 8 * STEPS, 8)}",
        *("train_batch_size=8", f"num_generations={GROUP}", "max_prompt_length=1024"),
        f"max_completion_length={completion_tokens}",
    ]


def copies(model, trained: bool) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad == trained}


def run(record: Record, sizes: Sizes, device: str) -> None:
    settings = {"optim": "adamw_torch", "weights": "bfloat16 under LoRA", "limit_gib": sizes.memory_limit_gib}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = save_model(sizes.grpo, place / "model", device, seed=0)
        if device == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(sizes.memory_limit_gib * GIB / total)
        plan = plan_of(place / "run", *overrides_of(place, model, sizes.completion_tokens))
        record.add(settings=settings, estimate=plan.memory_gib)
        trainer, figures = watched(plan, device, record)
    record.add(**figures, rewards=[log["reward"] for log in trainer.state.log_history if "reward" in log])


def watched(plan, device: str, record: Record) -> tuple:
    """Trained, with a look at which parameters moved."""
    before: dict[bool, dict[str, torch.Tensor]] = {}

    def remember(trainer) -> None:
        before.update({trained: copies(trainer.model, trained) for trained in (True, False)})

    trainer, figures = train_and_measure(plan, device, remember)
    after = {trained: copies(trainer.model, trained) for trained in (True, False)}
    moved, stayed = (
        [name for name, value in before[trained].items() if torch.equal(value, after[trained][name]) != trained]
        for trained in (True, False)
    )
    record.add(trained=len(before[True]), trained_moved=len(moved), frozen=len(before[False]), frozen_same=len(stayed))
    record.claim("every trained parameter moved", len(moved) == len(before[True]) > 0)
    record.claim("no frozen parameter moved", len(stayed) == len(before[False]) > 0)
    return trainer, figures
