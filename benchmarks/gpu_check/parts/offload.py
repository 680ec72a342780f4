"""One step of a teacher with frozen models that wait on the CPU, and with frozen models that stay: rewards agree."""

import tempfile
from pathlib import Path

from benchmarks.gpu_check.random_models import save_model, write_rows
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runs import plan_of, train_and_measure
from benchmarks.gpu_check.sizes import Sizes

GROUP = 4
TOLERANCE = 1e-2  # of rewards: the same kernels on the same tokens


def overrides_of(folder: Path, models: list[str], completion_tokens: int, offload: bool) -> list[str]:
    policy, student = models
    return [
        *("run_cfg=teacher_rlt_tiny", "warmup_run=null", "use_vllm=false", "max_steps=1"),
        "bf16=false",  # in bfloat16 a near tie may fall either way, and another token follow
        *(f"model_name_or_path={policy}", f"student_model={student}", "optim=adamw_torch"),
        *(f"dataset_id_or_path={folder / 'rows.jsonl'}", "gradient_checkpointing=true", "max_prompt_length=1024"),
        *("train_batch_size=8", "per_device_train_batch_size=4", f"num_generations={GROUP}"),
        *(f"max_completion_length={completion_tokens}", f"offload_untrained_models={str(offload).lower()}"),
    ]


def run(record: Record, sizes: Sizes, device: str) -> None:
    rewards, completions = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = [save_model(sizes.offload, place / f"model-{seed}", device, seed) for seed in (0, 1)]
        write_rows(place / "rows.jsonl", 8, 8)
        for offload in (True, False):
            name = "waiting" if offload else "staying"
            settings = overrides_of(place, models, sizes.completion_tokens // 4, offload)
            trainer, figures = train_and_measure(plan_of(place / name, *settings), device)
            rewards[name] = list(trainer._logs["rewards"]["teacher_reward"])
            completions[name] = list(trainer._logs["completion"])
            record.add(**{name: {**figures, "rewards": rewards[name]}})
            del trainer
    same = [a == b for a, b in zip(completions["waiting"], completions["staying"], strict=True)]
    pairs = zip(rewards["waiting"], rewards["staying"], same, strict=True)
    gaps = [abs(a - b) for a, b, equal in pairs if equal]
    record.add(same_completions=sum(same), worst_reward_gap=max(gaps, default=0.0))
    record.claim("most completions are the same", sum(same) > len(same) / 2)
    record.claim(f"rewards of the same completions agree to {TOLERANCE}", max(gaps, default=0.0) < TOLERANCE)
