"""Completions of a step: vLLM in process against Hugging Face's generate, on the same prompts and lengths."""

from pathlib import Path

from harness import Setting, alternate, figure, main, write_report


def worker(variant: str, setting: Setting) -> dict:
    import tempfile

    from harness import now
    from trainers_under_test import build

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(variant, setting, 1, folder)
    prompts = [row["prompt"] for row in trainer.train_dataset for _ in range(setting.generations)]
    ids, _, fields = trainer._tokenize_prompts(prompts)
    if variant == "stock":
        trainer.accelerator.prepare_model(trainer.model)  # autocast, as training has it
    seconds = []
    for _ in range(2):  # the first call starts up
        trainer._last_loaded_step = -1  # new weights and an empty prefix cache, as at each step
        start = now()
        completions, *_ = trainer._generate_single_turn(ids, None, fields, setting.generations)
        seconds.append(now() - start)
    assert all(len(tokens) == setting.completion_tokens for tokens in completions)
    return {"seconds": seconds[-1]}


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "stock"], settings, 2, out)
    figures = []
    for setting in settings:
        ours, theirs = ([run["seconds"] for run in results[name, setting]] for name in ("ours", "stock"))
        figures.append(figure(f"generation_{setting}", ours, theirs, "s", command))
    return write_report(out, figures, {})


if __name__ == "__main__":
    main(__file__, worker, report)
