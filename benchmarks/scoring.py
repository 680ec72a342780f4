"""A frozen model's log-probs of a step's completions: ours against one sample at a time, and against padded rows."""

from pathlib import Path

from harness import Setting, alternate, figure, main, write_report


def worker(variant: str, setting: Setting) -> dict:
    from passes import measure_pass

    return measure_pass(variant, setting, trained=False)


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "per_sample", "padded"], settings, 2, out)
    figures = []
    for setting in settings:
        ours = [run["seconds"] for run in results["ours", setting]]
        for peer in ("per_sample", "padded"):
            theirs = [run["seconds"] for run in results[peer, setting]]
            figures.append(figure(f"scoring_vs_{peer}_{setting}", ours, theirs, "s", command))
    runs = {f"{variant}_{setting}": measured for (variant, setting), measured in results.items()}
    return write_report(out, figures, {"runs": runs})


if __name__ == "__main__":
    main(__file__, worker, report)
