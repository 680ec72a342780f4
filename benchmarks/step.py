"""A whole step and its phases against stock TRL, with Hugging Face generation and with vLLM in process."""

from pathlib import Path
from statistics import median

from harness import Setting, alternate, figure, main, write_report

ROUNDS = 2


def worker(variant: str, setting: Setting) -> dict:
    from trainers_under_test import measure_step

    # The large setting's first step is not repeated: what starting costs is small beside its minutes.
    return measure_step(variant, setting, steps=2 if setting.name == "g8" else 1)


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["ours", "stock", "stock_vllm"], settings, ROUNDS, out)

    def of(variant: str, setting: str, phase: str) -> list[float]:
        return [run[phase] for run in results[variant, setting]]

    figures = []
    for setting in settings:
        for name, phase, peer in (
            ("scoring", "scoring", "stock_vllm"),  # both have a pass of the policy before it
            ("update", "update", "stock"),
            ("step_vs_stock", "step", "stock"),
            ("step_vs_stock_vllm", "step", "stock_vllm"),
        ):
            ours, theirs = of("ours", setting, phase), of(peer, setting, phase)
            figures.append(figure(f"{name}_{setting}", ours, theirs, "s", command))
    if "g8" in settings:
        figures.append(figure("memory_g8", of("ours", "g8", "memory"), of("stock", "g8", "memory"), "GiB", command))
    shares = {
        f"{variant}_{setting}_{phase}": median(
            floor_flops(run, phase) / run[phase] / run["matrix_rate"] for run in results[variant, setting]
        )
        for variant, setting in results
        for phase in ("update", "step")
    }
    runs = {f"{variant}_{setting}": measured for (variant, setting), measured in results.items()}
    table = write_report(out, figures, {"share_of_matrix_rate": shares, "runs": runs})
    lines = [f"{name:<32}{share:>7.1%}" for name, share in shares.items()]
    return "\n".join([table, "", "floor FLOPs / seconds / measured matrix rate", *lines])


def floor_flops(run: dict, phase: str) -> float:
    return run["floor"]["update"] if phase == "update" else sum(run["floor"].values())


if __name__ == "__main__":
    main(__file__, worker, report)
