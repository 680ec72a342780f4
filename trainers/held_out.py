"""Held-out questions, answered with seeds of their own at each evaluation and compared with the start by question."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from rlt.durable import as_json_lines, read_json_lines, write_whole
from rlt.errors import Refused
from rlt.estimates import finite_mean, paired_bootstrap
from rlt.reports.result import held_out_result, measure_of
from rlt.runs.folder import EVALUATIONS
from rlt.survival.kill_points import kill_point


@torch.no_grad()
def evaluate_held_out(trainer, rows: list[dict]) -> dict:
    """Sample and score `num_generations_eval` completions per question, each rank its share of the questions.

    Returns:
        `step`, and per quantity (reward, its parts, format_rate, length) one mean per question, in the rows' order.
    """
    model = trainer.model
    was_training = model.training
    model.eval()
    repeats = trainer.num_generations_eval
    inputs = [row for row in share_of(rows, trainer.accelerator) for _ in range(repeats)]
    prompts = [row["prompt"] for row in inputs]
    _, completion_ids, _, completions, *_ = trainer._generate(prompts)
    rewards = trainer._calculate_rewards(inputs, prompts, completions, completion_ids)  # of all ranks
    columns = dict(trainer._pending_extra_logs)
    trainer._pending_extra_logs = defaultdict(list)
    trainer._pending_metrics = defaultdict(list)
    trainer._metrics["eval"].clear()
    columns["length"] = [len(ids) for ids in completion_ids]
    if "matched" in columns:
        columns["format_rate"] = columns.pop("matched")
    columns = {name: gather_object(list(values)) for name, values in columns.items()}
    if len(trainer.reward_func_names) > 1:
        columns |= dict(zip(trainer.reward_func_names, rewards.T.tolist(), strict=True))
    columns["reward"] = _weighted(rewards, trainer.reward_weights.to(rewards.device)).tolist()
    model.train(was_training)
    per_question = {
        name: [finite_mean(values[i : i + repeats]) for i in range(0, len(rows) * repeats, repeats)]
        for name, values in columns.items()
        if all(isinstance(value, float | int) for value in values)  # rewards may log text
    }
    return {**per_question, "step": trainer.state.global_step}


def _weighted(rewards, weights) -> torch.Tensor:
    """(completions,): as in training, a reward that is missing counts for nothing beside others, and none is NaN."""
    return (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def share_of(rows: list[dict], accelerator) -> list[dict]:
    """This rank's questions, as many as every other's; the last ones are asked again where they do not go round."""
    count = -(-len(rows) // accelerator.num_processes)
    start = accelerator.process_index * count
    return [rows[min(place, len(rows) - 1)] for place in range(start, start + count)]


class HeldOutEvaluation(TrainerCallback):
    """Evaluates at the start, every `eval_steps`, and at the end; keeps every answer in `evaluations.jsonl`.

    Args:
        measure: of a trainer and rows, as `evaluate_held_out`.
    """

    def __init__(self, rows: list[dict], output_dir: str, measure: Callable[..., dict] = evaluate_held_out):
        self.rows, self.measure = rows, measure
        self.path = Path(output_dir) / EVALUATIONS
        self.trainer: Any = None  # set once the trainer exists
        self.records = read_json_lines(self.path)

    def on_train_begin(self, args, state, control, **kwargs):
        self.records = [r for r in self.records if r["step"] <= state.global_step]
        self._write()
        if state.global_step == 0:  # a resumed run has its start behind it
            self._evaluate_once(0)

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        if last or (args.eval_steps and state.global_step % int(args.eval_steps) == 0):
            self._evaluate_once(state.global_step)

    def _evaluate_once(self, step: int) -> None:
        if not self.rows or any(r["step"] == step for r in self.records):
            return
        kill_point("evaluation")
        self.records.append(self.measure(self.trainer, self.rows))
        self._write()
        means = {f"eval/{k}": finite_mean(v) for k, v in self.records[-1].items() if k != "step"}
        trainer, logs = self.trainer, {**means, **self._difference()}
        step_is_logged = trainer.control.should_log  # which the handler takes for done
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, logs)
        trainer.control.should_log = step_is_logged
        if trainer.args.load_best_model_at_end:
            self._look_for_the_best(step, means)

    def _look_for_the_best(self, step: int, means: dict[str, float]) -> None:
        """As `Trainer` does after evaluations of its own; every step that is evaluated then has a checkpoint."""
        trainer, wanted = self.trainer, self.trainer.args.metric_for_best_model
        if f"eval/{wanted}" not in means:
            known = ", ".join(key.removeprefix("eval/") for key in means)
            raise Refused(f"metric_for_best_model={wanted}: held-out questions have {known}")
        if step:  # before the first there is nothing to go back to
            trainer._determine_best_metric({f"eval_{wanted}": means[f"eval/{wanted}"]}, trial=None)
            trainer.control.should_save = True

    def _difference(self) -> dict[str, float]:
        """The paired difference of the last evaluation from the first, with its 95 % interval; empty at the start."""
        if len(self.records) < 2:
            return {}
        name = measure_of(self.records[0])
        gain = paired_bootstrap(self.records[0][name], self.records[-1][name])
        key = f"eval/{name}_difference"
        return {key: gain.mean, f"{key}_low": gain.low, f"{key}_high": gain.high}

    def _write(self) -> None:
        if not self.trainer.is_world_process_zero():
            return
        write_whole(self.path, as_json_lines(self.records))

    def sentence(self) -> str | None:
        """The run's result in one sentence; None before two evaluations."""
        args = self.trainer.args
        best = (args.metric_for_best_model, args.greater_is_better) if args.load_best_model_at_end else None
        result = held_out_result(self.records, self.trainer.num_generations_eval, best)
        return result.sentence if result else None
