"""Forward and backward over a micro-batch: ours against padded rows with the fused head, as stock TRL has them."""

from dataclasses import replace
from pathlib import Path

from harness import Setting, alternate, figure, main, write_report


def worker(variant: str, setting: Setting) -> dict:
    from passes import measure_pass

    return measure_pass(variant, replace(setting, prompts=1), trained=True)


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "padded"], settings, 2, out)
    figures = []
    for setting in settings:
        for key, unit in (("seconds", "s"), ("memory", "GiB")):
            ours, theirs = ([run[key] for run in results[name, setting]] for name in ("ours", "padded"))
            figures.append(figure(f"update_{key}_{setting}", ours, theirs, unit, command))
    runs = {f"{variant}_{setting}": measured for (variant, setting), measured in results.items()}
    return write_report(out, figures, {"runs": runs})


if __name__ == "__main__":
    main(__file__, worker, report)
