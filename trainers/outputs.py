"""What a run shows while it runs and leaves behind: metrics.jsonl, completions, a plot, one progress bar."""

import json
import logging
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback

from rlt.durable import as_json_lines, read_json_lines, write_whole, written_whole
from rlt.generation.seeds import request_seed
from rlt.reports.curves import draw_curves
from rlt.runs.folder import COMPLETIONS, CURVES, METRICS
from rlt.runs.learned import write_held_out, write_training_rows
from trainers.tracking import log_completions

logger = logging.getLogger("rlt")


class MetricsFile(TrainerCallback):
    """One JSON object per log, in `metrics.jsonl`; a resumed run drops lines from after its checkpoint."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / METRICS

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            kept = [row for row in read_json_lines(self.path) if row["step"] <= state.global_step]
            write_whole(self.path, as_json_lines(kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        numbers = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in logs.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "time": round(time.time(), 1), **numbers}) + "\n")


def update_seconds(metrics: dict[str, list[float]]) -> float:
    """What a step takes besides generation and scoring, on average.

    Args:
        metrics: since they were logged last; `step_time` has one value a step, the others one a generated batch.
    """
    before = sum(sum(metrics.get(phase, ())) for phase in ("generation/seconds", "scoring/seconds"))
    return (sum(metrics["step_time"]) - before) / len(metrics["step_time"])


class ProgressBar(TrainerCallback):
    """One bar on the main process: reward, KL, tokens per second and time left."""

    def __init__(self):
        self.bar = None
        self.tokens: float | None = None
        self.since = 0.0  # when they were counted

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = {"loss": logs["loss"]} if "reward" not in logs else {"reward": logs["reward"], "kl": logs.get("kl")}
        shown |= {"entropy": logs["entropy"]} if "divergence" in logs else {}
        now, tokens = time.monotonic(), logs.get("num_tokens")
        if tokens is not None and self.tokens is not None and now > self.since:
            shown["tok/s"] = (tokens - self.tokens) / (now - self.since)
        self.tokens, self.since = tokens, now
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


ASKED = ("question", "solution")


def asked_columns(rows: list[dict]) -> dict[str, list]:
    """What stands beside each completion, of the columns that all rows have."""
    return {column: [row[column] for row in rows] for column in ASKED if all(column in row for row in rows)}


def places_of_step(step: int, accumulation: int, steps_per_generation: int, ranks: int, count: int) -> list[int]:
    """Which of the logged completions an optimizer step trains on.

    Args:
        step: of the optimizer, from 1.
        accumulation: micro-batches of a step on each rank.
        steps_per_generation: micro-batches that are generated together; several steps' where it is more.
        count: of the logged completions: the first rank's micro-batches, one after the other, then the next rank's.
    """
    if steps_per_generation <= accumulation:  # all that a step generated
        return list(range(count))
    first = (step - 1) * accumulation % steps_per_generation
    of_rank, of_micro_batch = count // ranks, count // ranks // steps_per_generation
    wanted = range(first * of_micro_batch, (first + accumulation) * of_micro_batch)
    return [rank * of_rank + place for rank in range(ranks) for place in wanted]


def hold(logs: dict, count: int) -> None:
    """Let the trainer's logs keep the completions of a whole step; TRL keeps those of one generation."""
    for name, kept in logs.items():
        logs[name] = deque(kept, count) if isinstance(kept, deque) else defaultdict(partial(deque, maxlen=count), kept)


class CompletionsFile(TrainerCallback):
    """Writes a step's completions with their rewards, parts and advantages to `completions/step-00001.parquet`."""

    def __init__(self, output_dir: str, probability: float):
        self.folder = Path(output_dir) / COMPLETIONS
        self.probability = probability
        self.trainer: Any = None  # set once the trainer exists

    def on_train_begin(self, args, state, control, **kwargs):
        of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        hold(self.trainer._logs, max(of_step, args.generation_batch_size))

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_chosen(args, state):
            return
        logs = self.trainer._logs
        if not (state.is_world_process_zero and logs["prompt"]):
            return
        import pandas

        rewards = {"reward": weighted_sum(list(logs["rewards"].values()), self.trainer.reward_weights.tolist())}
        if len(logs["rewards"]) > 1:
            rewards |= {f"reward/{name}": values for name, values in logs["rewards"].items()}
        columns = {"prompt": logs["prompt"], "completion": logs["completion"], **rewards, **logs["extra"]}
        table = pandas.DataFrame({name: list(values) for name, values in columns.items()})
        table["advantage"] = list(logs["advantages"])
        generated = (args.gradient_accumulation_steps, args.steps_per_generation, args.world_size)
        table = table.iloc[places_of_step(state.global_step, *generated, len(table))].reset_index(drop=True)
        self._leave(table, args, state.global_step)

    def _is_chosen(self, args, state) -> bool:
        """Whether this step's are written; the same on all ranks."""
        drawn = random.Random(request_seed(args.seed, "completions", state.global_step)).random()
        return drawn < self.probability

    def _leave(self, table, args, step: int) -> None:
        self.folder.mkdir(exist_ok=True)
        table.insert(0, "step", step)
        with written_whole(self.folder / f"step-{step:05d}.parquet") as aside:
            table.to_parquet(aside)
        log_completions(args.report_to, table, step)


class DistilledCompletions(CompletionsFile):
    """The same of a trainer without rewards: `completions_of_step` has divergence and entropy of each completion."""

    def on_train_begin(self, args, state, control, **kwargs):
        """The trainer holds a step's completions itself."""

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_chosen(args, state):
            return
        rows = gather_object(self.trainer.completions_of_step())
        if state.is_world_process_zero:
            import pandas

            self._leave(pandas.DataFrame(rows), args, state.global_step)


def weighted_sum(rewards: list[Sequence[float]], weights: list[float]) -> list[float]:
    """What each completion was rewarded with by several functions together: as TRL has it, but for NaN where none is
    finite."""
    totals = []
    for values in zip(*rewards, strict=True):
        finite = [w * v for w, v in zip(weights, values, strict=True) if v is not None and math.isfinite(v)]
        totals.append(sum(finite) if finite else math.nan)
    return totals


class Plot(TrainerCallback):
    """Curves over the steps, drawn from `metrics.jsonl` at every save and at the end."""

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_curves({self.folder.name: self.folder}, self.folder / CURVES)

    on_train_end = on_save


def leave_rows(trainer, train_rows: list[dict], eval_rows: list[dict]) -> None:
    """In the output folder: held-out rows for later evaluations, and what says whether a later life has the same."""
    if not trainer.is_world_process_zero():
        return
    if eval_rows:
        write_held_out(Path(trainer.args.output_dir), eval_rows)
    write_training_rows(Path(trainer.args.output_dir), train_rows)
