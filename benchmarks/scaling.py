"""Cost of a log-prob pass against group size, prompt, completion and model size: ours against padded rows."""

from dataclasses import replace
from pathlib import Path

from harness import SETTINGS, Setting, alternate, figure, main, write_report

BASE = Setting("base", prompts=1, prompt_tokens=400, generations=8, completion_tokens=128)
SWEEPS = {
    "generations": [1, 4, 16, 32],
    "prompt_tokens": [200, 800, 1600],
    "completion_tokens": [32, 512],
    "shape": ["360m"],
}
SETTINGS |= {"base": BASE} | {
    f"{key}={value}": replace(BASE, name=f"{key}={value}", **{key: value})
    for key, values in SWEEPS.items()
    for value in values
}


def worker(variant: str, setting: Setting) -> dict:
    from passes import measure_pass

    return measure_pass(variant, setting, trained=False)


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "padded"], settings, 1, out)
    figures = []
    for name in settings:
        ours, theirs = ([run["seconds"] for run in results[variant, name]] for variant in ("ours", "padded"))
        figures.append(figure(name, ours, theirs, "s", command))
    return write_report(out, figures, {})


if __name__ == "__main__":
    main(__file__, worker, report, usual=[name for name in SETTINGS if name == "base" or "=" in name])
