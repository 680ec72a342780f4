"""Seeded sampling on the CPU, one number a token (generation/cpu_sampling.py), against vLLM's own."""

from pathlib import Path

from harness import SETTINGS, Setting, alternate, figure, main, write_report

SETTINGS |= {"wide": Setting("wide", prompts=32, prompt_tokens=100, generations=4, completion_tokens=96)}


def worker(variant: str, setting: Setting) -> dict:
    import tempfile

    from harness import now
    from trainers_under_test import build

    from rlt.generation.cpu import sampling as cpu_sampling

    if variant == "vllm":
        cpu_sampling.install = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        trainer = build("ours", setting, 1, folder)
    prompts = [row["prompt"] for row in trainer.train_dataset for _ in range(setting.generations)]
    ids, _, fields = trainer._tokenize_prompts(prompts)
    for _ in range(2):  # the first call starts up
        trainer._last_loaded_step = -1  # new weights and an empty prefix cache, as at each step
        start = now()
        completions, *_ = trainer._generate_single_turn(ids, None, fields, setting.generations)
        seconds = now() - start
    tokens = sum(map(len, completions))
    assert tokens == setting.completions * setting.completion_tokens
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "vllm"], settings, 2, out)
    figures, rates = [], {}
    for setting in settings:
        ours, theirs = ([run["seconds"] for run in results[name, setting]] for name in ("ours", "vllm"))
        figures.append(figure(f"sampling_{setting}", ours, theirs, "s", command))
        rates[setting] = {
            name: [run["tokens_per_second"] for run in results[name, setting]] for name in ("ours", "vllm")
        }
    return write_report(out, figures, {"tokens_per_second": rates})


if __name__ == "__main__":
    main(__file__, worker, report, usual=["wide"])
