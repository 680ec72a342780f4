"""An update of on-policy distillation against stock TRL's: what is left of a step once its completions are written.

Both trainers get the same completions, prompts and teacher (the base 135M model; the student is a copy of it that was
moved a little), and read them behind the student's prompt, as stock TRL can. Seconds are those of a whole optimizer
step: the teacher's pass, forward, backward, optimizer. A pass of sixteen completions of g16 takes stock TRL more than
23 GiB, so its passes have `STOCK_PASS` completions at most.
"""

import tempfile
from pathlib import Path

from harness import MODEL, Setting, alternate, figure, main, now, peak_memory_gib, rows_of, write_report

STEPS = 2  # of which the first is not counted
STOCK_PASS = 8  # completions of a pass of stock TRL
MOVED = 5e-3  # standard deviation of the noise on the student's weights


def worker(variant: str, setting: Setting) -> dict:
    """Median seconds of an update, peak memory, and the loss of the first, which both variants have to share."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(variant, setting, folder)
        seconds: list[float] = []
        losses: list[float] = []
        inner = trainer.training_step

        def timed(*args, **kwargs):
            start = now()
            loss = inner(*args, **kwargs)
            seconds.append(now() - start)
            losses.append(loss.item())
            return loss

        trainer.training_step = timed
        trainer.train()
    each = setting.completions // pass_of(variant, setting)
    return {
        "seconds": sum(seconds[-each:]),
        "memory": peak_memory_gib(),
        "loss": sum(losses[:each]),
    }


def pass_of(variant: str, setting: Setting) -> int:
    """Completions of a forward and backward pass."""
    return setting.micro_batch if variant == "ours" else min(setting.micro_batch, STOCK_PASS)


def build(variant: str, setting: Setting, folder: str):
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from passes import DEVICE, HALF

    from rlt.models.embedded import embedded_model_path
    from rlt.models.loading import load_frozen, load_policy, load_tokenizer
    from rlt.prompts.styles import load_format
    from rlt.survival.host_memory import ReturnFreedMemory
    from trainers.configs import DistillationConfig
    from trainers.distillation import DistillationTrainer

    transformers.utils.logging.set_verbosity_error()
    path = str(embedded_model_path(MODEL))
    tokenizer = load_tokenizer(path)
    attention = {"attn_implementation": "sdpa"} if variant == "stock" else {}
    student, teacher = load_policy(path, **attention), load_frozen(path, HALF, **attention)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += MOVED * torch.randn(parameter.shape, generator=generator)
    ours = variant == "ours"
    repeats = 1 if ours else setting.generations  # stock TRL asks each row once
    rows = [{**row, "teacher_prompt": row["prompt"]} for row in rows_of(setting, tokenizer) for _ in range(repeats)]
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": pass_of(variant, setting),
        "gradient_accumulation_steps": setting.completions // pass_of(variant, setting),
        "max_completion_length": setting.completion_tokens,
        "max_steps": STEPS,
        "learning_rate": 1e-6,
        "bf16": torch.bfloat16 == HALF,
        "use_cpu": DEVICE == "cpu",
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    shared = {"model": student, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if ours:
        args = DistillationConfig(num_generations=setting.generations, num_generations_eval=1, **options)
        ours_alone = {"teacher": teacher, "style": load_format("stratos"), "callbacks": [ReturnFreedMemory()]}
        trainer = DistillationTrainer(args=args, **ours_alone, **shared)
    else:
        trainer = trl.DistillationTrainer(args=trl.DistillationConfig(**options), teacher_model=teacher, **shared)
    trainer._generate_single_turn = made_up(setting, len(tokenizer))
    return trainer


def made_up(setting: Setting, vocabulary: int):
    """Completions from where they stand, the same for both, in no time."""
    import torch

    def generate(prompt_ids, *_, **__) -> list[list[int]]:
        generator = torch.Generator().manual_seed(len(prompt_ids))
        shape = (len(prompt_ids), setting.completion_tokens)
        return torch.randint(100, vocabulary, shape, generator=generator).tolist()

    return generate


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "stock"], settings, 2, out)
    figures = []
    for setting in settings:
        for key, unit in (("seconds", "s"), ("memory", "GiB")):
            ours, theirs = ([run[key] for run in results[name, setting]] for name in ("ours", "stock"))
            figures.append(figure(f"distillation_{key}_{setting}", ours, theirs, unit, command))
    runs = {f"{variant}_{setting}": measured for (variant, setting), measured in results.items()}
    return write_report(out, figures, {"runs": runs})


if __name__ == "__main__":
    main(__file__, worker, report)
