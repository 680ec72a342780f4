"""What every benchmark shares: settings, inputs, workers in processes of their own, the floor, tables and pictures."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
MODEL = "embedded/smollm2-135m-instruct"
WORKER_LIMIT_S = 1800


@dataclass(frozen=True)
class Setting:
    """Shape of a step: prompts of about so many tokens, completions of exactly so many."""

    name: str
    prompts: int
    prompt_tokens: int
    generations: int
    completion_tokens: int = 128
    micro_batch: int = 8  # completions of one forward and backward pass
    shape: str | None = None  # random weights of this shape (passes.py); None: the embedded model

    @property
    def completions(self) -> int:
        return self.prompts * self.generations


SETTINGS = {
    "g8": Setting("g8", prompts=1, prompt_tokens=380, generations=8),
    "g16": Setting("g16", prompts=2, prompt_tokens=600, generations=16, micro_batch=16),
    # For a GPU: log-prob passes and updates of a usual teacher, by random weights.
    "7b": Setting("7b", prompts=1, prompt_tokens=1024, generations=8, completion_tokens=1024, shape="7b"),
}


@dataclass(frozen=True)
class Figure:
    """A measured ratio: peer / ours for times, ours / peer for memory."""

    name: str
    ours: float
    peer: float
    ratio: float
    unit: str
    command: str
    runs: dict[str, list[float]]


def rows_of(setting: Setting, tokenizer) -> list[dict[str, str]]:
    """Questions whose teacher's prompts have about `prompt_tokens` tokens, with worked solutions of 20 or more."""
    import reasoning_gym

    from rlt.prompts.rendering import prompt_token_ids, render_teacher_prompt
    from rlt.prompts.styles import load_format

    style = load_format("stratos")
    items = iter(reasoning_gym.create_dataset("gsm_symbolic", size=500, seed=7))
    rows = []
    while len(rows) < setting.prompts:
        item = next(items)
        question, solution = item["question"], item["metadata"]["answer_cot"]
        while True:
            prompt = render_teacher_prompt(tokenizer, style, question, solution)
            if len(prompt_token_ids(tokenizer, [prompt])[0]) >= setting.prompt_tokens:
                break
            question = f"{next(items)['question']}\n\n{question}"
        assert len(tokenizer.encode(solution)) >= 20, solution
        rows.append({"question": question, "solution": solution, "prompt": prompt})
    return rows


def now() -> float:
    """Seconds, once the device has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds by phase, summed over calls."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - start

    def watch(self, owner, method: str, name: str) -> None:
        """Time every call of a bound method."""
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.phase(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


def peak_memory_gib() -> float:
    """Largest resident set of this process so far; on a GPU, the largest allocation there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matrix_rate() -> float:
    """FLOP/s of large bfloat16 products (float32 where the device has no bfloat16), the best of six."""
    import torch

    from rlt.models.devices import supports_bfloat16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 3072
    dtype = torch.bfloat16 if supports_bfloat16(device) else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Floor:
    """The fewest FLOPs of a step: each distinct token once, no recomputation, the head where tokens count."""

    generation: float
    reference: float
    student: float
    update: float

    @property
    def step(self) -> float:
        return self.generation + self.reference + self.student + self.update


def forward_flops(setting: Setting, prompt: float, model) -> float:
    """FLOPs of each distinct token once, `prompt` tokens in the mean; attention is 4 x width per token seen."""
    config = model.config
    head = 2 * config.hidden_size * config.vocab_size
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    per_token = 2 * (matrices - (config.hidden_size * config.vocab_size if not config.tie_word_embeddings else 0))
    width = 4 * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    completion = setting.completion_tokens
    pairs = setting.prompts * prompt**2 / 2 + setting.completions * completion * (prompt + completion / 2)
    tokens = setting.prompts * prompt + setting.completions * completion
    trunk = tokens * per_token + pairs * width * config.num_hidden_layers
    return trunk + setting.completions * completion * head


def floor_of(setting: Setting, prompt: float, model) -> Floor:
    """A backward pass is two forward passes' products."""
    forward = forward_flops(setting, prompt, model)
    return Floor(forward, forward, forward, 3 * forward)


def run_worker(script: Path, variant: str, setting: str, out: Path) -> dict:
    """One measurement in a process of its own.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    command = [sys.executable, str(script), "--worker", variant, "--setting", setting, "--out", str(out)]
    out.unlink(missing_ok=True)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WORKER_LIMIT_S,
        cwd=ROOT,
        check=False,
        env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"},  # as train.py has it; for the peers as well
    )
    if done.returncode:
        raise RuntimeError(f"{variant} at {setting} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return json.loads(out.read_text(encoding="utf-8"))


def alternate(
    script: Path, variants: list[str], settings: list[str], rounds: int, out: Path
) -> dict[tuple, list[dict]]:
    """A B A B: every variant in turn, `rounds` times, setting by setting."""
    results: dict[tuple, list[dict]] = {}
    for setting in settings:
        for number in range(rounds):
            for variant in variants:
                measured = run_worker(script, variant, setting, out / "worker.json")
                results.setdefault((variant, setting), []).append(measured)
                sys.stderr.write(f"{setting} round {number + 1}: {variant} {measured}\n")
    (out / "worker.json").unlink(missing_ok=True)
    return results


def figure(name: str, ours: list[float], peer: list[float], unit: str, command: str) -> Figure:
    """Medians over rounds and their ratio; more is better for times (peer / ours), less for memory (ours / peer)."""
    a, b = median(ours), median(peer)
    ratio = a / b if unit == "GiB" else b / a
    return Figure(name, a, b, ratio, unit, command, {"ours": ours, "peer": peer})


def write_report(out: Path, figures: list[Figure], extra: dict) -> str:
    """`results.json`, `results.png`, and the table as text."""
    (out / "results.json").write_text(
        json.dumps({"figures": [asdict(f) for f in figures], **extra}, indent=1), encoding="utf-8"
    )
    draw(out / "results.png", figures)
    lines = [f"{'figure':<24}{'ours':>10}{'peer':>10}  {'unit':<6}{'ratio':>7}"]
    lines += [f"{f.name:<24}{f.ours:>10.2f}{f.peer:>10.2f}  {f.unit:<6}{f.ratio:>7.2f}" for f in figures]
    return "\n".join(lines)


def draw(path: Path, figures: list[Figure]) -> None:
    """Horizontal bars of the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axis = pyplot.subplots(figsize=(7, 0.4 * len(figures) + 1), layout="constrained")
    names = [f.name for f in figures]
    axis.barh(names, [f.ratio for f in figures], color=["#7a7a7a" if f.unit == "GiB" else "#2a6f97" for f in figures])
    for row, f in enumerate(figures):
        axis.text(f.ratio, row, f" {f.ratio:.2f}", va="center")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("peer / ours (time, more is better); ours / peer (memory, less is better)")
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120)
    pyplot.close(fig)


def main(
    script: str,
    worker: Callable[[str, Setting], dict],
    report: Callable[[Path, str, list[str]], str],
    usual: Sequence[str] = ("g8", "g16"),
) -> None:
    """`--out DIR` measures everything; `--worker` is how the processes of a measurement are started."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder (or, for a worker, file) of the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="g8", help=argparse.SUPPRESS)
    parser.add_argument("--settings", nargs="+", default=usual, choices=list(SETTINGS), help="shapes of a step")
    args = parser.parse_args()
    if args.worker:
        args.out.write_text(json.dumps(worker(args.worker, SETTINGS[args.setting])), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/{Path(script).name} --out DIR"
    if list(args.settings) != list(usual):
        command += f" --settings {' '.join(args.settings)}"
    try:
        sys.stdout.write(report(args.out, command, args.settings) + "\n")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(f"error: {error}")
