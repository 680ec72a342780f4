"""A run's result in one sentence, with its interval: what a run prints at its end and what stands at a page's top.

Made from what a run leaves in its folder, so that the sentence on a page is the printed one.
"""

import html
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from rlt.durable import read_json, read_json_lines
from rlt.estimates import Estimate, finite_mean, paired_bootstrap
from rlt.runs.folder import ALL_TRACES, EVALUATION, EVALUATIONS, MARKER, TRACES, run_in

WIDTH, HEIGHT, MARGIN = 320, 34, 8  # pixels of a drawn interval


@dataclass(frozen=True)
class Result:
    """A sentence, and the interval of the figure that it is about.

    Args:
        sentence: one line.
        estimate: None where the result has no interval.
        zero_matters: whether the figure is a difference, so that an interval across zero says nothing.
    """

    sentence: str
    estimate: Estimate | None = None
    zero_matters: bool = False


def result_of(folder: Path) -> Result | None:
    """Of the run in a folder; None where it has left no result yet, or has none to give."""
    config = run_in(folder)
    if (evaluated := read_json(folder / EVALUATION)) is not None:
        return evaluation_result(config, evaluated)
    if (folder / TRACES).is_file() and (folder / ALL_TRACES).is_file():
        return traces_result(folder)
    if records := read_json_lines(folder / EVALUATIONS):
        quantity = config.get("metric_for_best_model") or measure_of(records[0])
        best = (quantity, config.get("greater_is_better") is not False)
        answers = config.get("num_generations_eval") or config["num_generations"]  # as TRL has it
        return held_out_result(records, answers, best if config.get("load_best_model_at_end") else None)
    return None


def finished(folder: Path) -> str:
    """How far a run came."""
    done = read_json(folder / MARKER)
    if done is None:
        return "not finished yet"
    return ", ".join(f"{name} {value:g}" for name, value in done.items() if value is not None)


# Held-out questions of a training run


def held_out_result(records: list[dict], answers: int, best: tuple[str, bool] | None = None) -> Result | None:
    """The last evaluation against the first one, by question; None before two evaluations.

    Args:
        records: of `evaluations.jsonl`: `step`, and a list with one mean per question for each quantity.
        answers: to each question.
        best: where the run keeps its best weights and not its last: the quantity, and whether more of it is better.
    """
    if len(records) < 2:
        return None
    first, last = records[0], kept(records, best)
    name = measure_of(first)
    gain = paired_bootstrap(first[name], last[name])
    text = (
        f"{name} on {len(last[name])} held-out questions x {answers}: "
        f"{finite_mean(first[name]):.3f} -> {finite_mean(last[name]):.3f}, "
        f"paired difference {gain.signed} (95 % bootstrap)"
    )
    if "solution_log_prob_reward" in last:
        solution = paired_bootstrap(first["solution_log_prob_reward"], last["solution_log_prob_reward"])
        text += f"; solution part {solution.signed}; format rate {finite_mean(last['format_rate']):.0%}"
    if "answer_reward" in last:
        before, after = first["answer_reward"], last["answer_reward"]
        text += f"; accuracy {finite_mean(before):.1%} -> {finite_mean(after):.1%}, "
        text += paired_bootstrap(before, after).signed
    if best:
        text += f"; step {last['step']}, chosen on these questions from {len(records) - 1} evaluations"
    text += f"; length {finite_mean(first['length']):.0f} -> {finite_mean(last['length']):.0f} tokens"
    return Result(text, gain, zero_matters=True)


def measure_of(record: dict) -> str:
    """What an evaluation of held-out questions measures first: rewards, or a student's accuracy where there are none.

    Args:
        record: of `evaluations.jsonl`.
    """
    return "reward" if "reward" in record else "accuracy"


def kept(records: list[dict], best: tuple[str, bool] | None) -> dict:
    """The evaluation of the weights that a run ends with: its last, or the first of its best ones after the start."""
    if best is None:
        return records[-1]
    quantity, more_is_better = best
    means = [(finite_mean(record[quantity]), record) for record in records if record["step"]]
    finite = [(mean if more_is_better else -mean, record) for mean, record in means if isfinite(mean)]
    return max(finite, key=lambda pair: pair[0])[1] if finite else records[-1]


# Jobs


def traces_result(folder: Path) -> Result:
    import pandas

    scored = pandas.read_parquet(folder / ALL_TRACES, columns=["matched"])["matched"]
    count = len(pandas.read_parquet(folder / TRACES, columns=["matched"]))
    return Result(traces_sentence(count, len(scored), float(scored.mean())))


def traces_sentence(count: int, scored: int, format_rate: float) -> str:
    """What a collection came to.

    Args:
        count: of the traces that are kept.
        scored: how many were written and scored.
        format_rate: the share of these with the format.
    """
    return f"{count} of {scored} traces kept, {format_rate:.0%} have the format"


def evaluation_result(config: dict, result: dict) -> Result:
    """The first figure, and the difference where there is one."""
    name, value = next(iter(result["figures"].items()))
    text = f"{evaluation_heading(config, result)}: {name} {Estimate(**value)}"
    if "difference" not in result:
        return Result(text, Estimate(**value))
    return Result(f"{text}; {evaluation_difference(config, result)}", Estimate(**result["difference"]), True)


def evaluation_heading(config: dict, result: dict) -> str:
    return f"{config['model_name_or_path']} on {result['questions']} questions of {config['dataset_id_or_path']}"


def evaluation_difference(config: dict, result: dict) -> str:
    """From the evaluation that it was compared with."""
    over = f", paired over {result['compared']} questions" if "compared" in result else ", paired"
    return f"against {config['compare_with']}: {Estimate(**result['difference']).signed}{over}"


# On a page


def summary(runs: dict[str, Path]) -> str:
    """A line for each run, its interval drawn under it.

    Args:
        runs: folders by what the page calls them.
    """
    return f"<div class=results>{''.join(line(label, folder) for label, folder in runs.items())}</div>"


def line(label: str, folder: Path) -> str:
    result = result_of(folder)
    said = html.escape(result.sentence if result else "no result with an interval")
    drawn = interval(result) if result else ""
    return f"<p><b>{html.escape(label)}</b> <span class=n>({html.escape(finished(folder))})</span><br>{said}</p>{drawn}"


def interval(result: Result) -> str:
    """The interval to scale: of a difference around zero, of a share from 0 to 1; empty where it is not finite."""
    found = result.estimate
    if found is None or not found.low <= found.mean <= found.high:  # NaN compares as false
        return ""
    low, high = (min(found.low, 0.0), max(found.high, 0.0)) if result.zero_matters else (0.0, max(1.0, found.high))
    width = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{MARGIN + (value - low) / width * (WIDTH - 2 * MARGIN):.1f}"

    middle = HEIGHT / 2
    shown = found.signed if result.zero_matters else str(found)
    return (
        f'<svg class=interval width={WIDTH} height={HEIGHT} role=img aria-label="95 % interval: {shown}">'
        f"<title>95 % interval: {shown}</title>"
        f'<line class=axis x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}"/>'
        f'<line class=zero x1="{x(0.0)}" x2="{x(0.0)}" y1="4" y2="{HEIGHT - 4}"/>'
        f'<line class=range x1="{x(found.low)}" x2="{x(found.high)}" y1="{middle}" y2="{middle}"/>'
        f'<circle cx="{x(found.mean)}" cy="{middle}" r="5"/></svg> <span class=n>{shown}</span>'
    )
