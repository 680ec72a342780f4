"""What a student can do: accuracy, pass@k and average@k with intervals, format, length; against another evaluation.

    ./launch_mono.sh evaluate_tiny model_name_or_path=results/student_distill_tiny compare_with=results/before

Leaves `answers.parquet`, `evaluation.json`, `evaluation.png` and a table on standard output. Questions are answered in
parts, each written at once: after a kill the same command goes on with the next part.
"""

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from rlt.data.sources import say_dropped
from rlt.data.splits import check_disjoint
from rlt.durable import write_whole, written_whole
from rlt.errors import Refused
from rlt.estimates import Estimate, bootstrap, paired_difference, pass_at_k
from rlt.generation.seeds import request_seed
from rlt.planning.plan import Plan
from rlt.prompts.rendering import prompt_token_ids, render_question
from rlt.prompts.styles import load_format
from rlt.reports.result import evaluation_difference, evaluation_heading
from rlt.runs.dashboard import log_figures
from rlt.runs.folder import ANSWERS, CONFIG, EVALUATION, EVALUATION_PICTURE, mark_complete
from rlt.runs.learned import learned_rows, lineage, rows_of
from rlt.runs.parts import Parts
from rlt.schema import EvaluateSettings

COMPARABLE = (
    *("max_completion_length", "temperature", "top_p", "answer_line", "reasoning_format", "verifier"),
    "use_dataset_system_prompt",
)

logger = logging.getLogger("rlt")


def run(plan: Plan, stop) -> None:
    """Answer what has not been answered, as one rank of however many; the first one then sums it up.

    Args:
        stop: a `StopOnSignal`, asked between two parts.
    """
    from rlt.generation.sampler import Sampler
    from rlt.models.loading import quiet_libraries
    from rlt.prompts.rows import question_rows, student_system
    from rlt.rewards.verifiers import Verifier

    config = plan.config
    settings: EvaluateSettings = plan.settings
    folder = Path(settings.output_dir)
    check_comparable(config)
    quiet_libraries()
    rows, style = questions(config), load_format(settings.reasoning_format)

    def prompt_of(tokenizer, row, data):
        return render_question(tokenizer, style, row["question"], student_system(row, data), settings.answer_line)

    sampler, asked = Sampler(settings), len(rows)
    rows = question_rows(rows, sampler.tokenizer, settings, prompt_of)
    check_common_question(settings.compare_with, rows)
    parts = Parts(folder, len(rows), settings.questions_at_once)
    parts.keep_to(sampler.accelerator, config, rows, style)
    verifier = Verifier(settings.verifier, settings.verifier_limit_s, settings.ddp_timeout)
    stop.begin()
    parts.work(sampler.accelerator, stop, lambda part: answer(settings, sampler, verifier, rows, part))
    if verifier.failures:
        logger.warning(
            "%d answers broke their check or were not checked in time: they count as wrong", verifier.failures
        )
    stop.leave_together()
    if sampler.accelerator.is_main_process:
        result = sum_up(settings, parts.read(), folder, asked - len(rows))
        log_figures(config, logged(result))
        mark_complete(folder, {"questions": result["questions"]})
        sys.stdout.write(table(settings, result))


def questions(config: dict) -> list[dict]:
    """The rows to answer.

    Raises:
        Refused: there are none, the model was trained on some of them, or they cannot be checked.
    """
    from rlt.rewards.verifiers import check_rows

    loaded = rows_of(config)
    say_dropped(loaded.dropped, config["dataset_id_or_path"])
    if not loaded.rows:
        raise Refused(f"dataset_id_or_path={config['dataset_id_or_path']}: no usable row, {loaded.dropped}")
    check_apart(config, loaded.rows, list(lineage(Path(config["model_name_or_path"]).expanduser())))
    check_apart(config, loaded.rows, trained_on(config), must_be_there=True)
    check_rows(config["verifier"], loaded.rows)
    return loaded.rows


def check_comparable(config: dict) -> None:
    """That the evaluation to compare with asked and judged in the same way.

    Raises:
        Refused: the first key that differs, with both values; or nothing says how it asked.
    """
    other = config["compare_with"]
    if other is None:
        return
    file = Path(other) / CONFIG
    if not file.is_file():
        raise Refused(f"compare_with={other} holds no {CONFIG}: name the output folder of an evaluation")
    check_same_way(config, yaml.safe_load(file.read_text(encoding="utf-8")))


def check_same_way(config: dict, other: dict) -> None:
    """Refuse to compare an evaluation with one that asked or judged otherwise.

    Raises:
        Refused: the first key that differs, with both values.
    """
    for key in COMPARABLE:
        if key in other and other[key] != config[key]:
            raise Refused(
                f"compare_with={config['compare_with']}: {key} is {other[key]} there and {config[key]} here, so the "
                "difference would not be the model's: evaluate both in the same way"
            )


def check_common_question(other: str | None, rows: list[dict]) -> None:
    """Refuse a comparison of evaluations without a common question.

    Raises:
        Refused: there is nothing to compare with.
    """
    if other and not compared(other, {row["question"] for row in rows}):
        raise Refused(f"compare_with={other}: the two evaluations share no question")


def compared(other: str, questions: Iterable[str]) -> set[str]:
    """The questions that the evaluation to compare with has answered too."""
    return set(json.loads((Path(other) / EVALUATION).read_text(encoding="utf-8"))["accuracy"]) & set(questions)


def check_apart(config: dict, rows: list[dict], learned: list[dict], must_be_there: bool = False) -> None:
    """That no row to be answered is among those that a training run learns from.

    Args:
        config: of the evaluation.
        rows: what it asks.
        learned: configurations of training runs; what they hold out themselves may be asked.
        must_be_there: their sources; else one that is gone since is said.

    Raises:
        Refused: how many are, and the first.
    """
    for earlier in learned:
        try:
            seen = learned_rows(earlier)
        except Refused as error:
            if must_be_there:
                raise
            logger.warning("not checked against %s: %s", earlier["dataset_id_or_path"], error)
            continue
        try:
            check_disjoint(seen, rows)
        except Refused as error:
            sources = f"{config['dataset_id_or_path']} against {earlier['dataset_id_or_path']}"
            raise Refused(f"dataset_id_or_path={sources}: {error}") from None


def trained_on(config: dict) -> list[dict]:
    """What `trained_on` names beside the model's own runs, as configurations: of a run, by its output folder, and of
    those that it started from; or of a file or a hub's dataset.

    Raises:
        Refused: a task is named, of which a run has drawn rows of its own, or a pipeline.
    """
    named = config["trained_on"]
    if named is None:
        return []
    if named.startswith("reasoning_gym/"):
        raise Refused(f"trained_on={named}: which questions were drawn is in a run's output folder, name that")
    everything = {"dataset_split": "train", "dataset_seed": 0, "dataset_size": None, "eval_size": 0}
    return list(lineage(Path(named).expanduser())) or [{**config, **everything, "dataset_id_or_path": named}]


def answer(settings: EvaluateSettings, sampler, verifier, rows: list[dict], part: range) -> list[dict]:
    """Every answer to a part's questions, checked."""
    from rlt.rewards.verifiers import final_answer
    from rlt.survival.kill_points import kill_point

    style, count = load_format(settings.reasoning_format), settings.samples_per_question
    asked = [number for number in part for _ in range(count)]
    prompts = prompt_token_ids(sampler.tokenizer, [rows[number]["prompt"] for number in asked])
    seeds = [request_seed(settings.seed, "evaluate", n) + member for n in part for member in range(count)]
    kill_point("evaluating")
    sampled, _ = sampler(prompts, seeds)
    texts = sampler.tokenizer.batch_decode(sampled, skip_special_tokens=True)
    answers = [final_answer(text, style) for text in texts]
    scores = verifier.check_batch(answers, [rows[number] for number in asked])
    made = []
    for number, text, ids, given, right in zip(asked, texts, sampled, answers, scores, strict=True):
        known = {key: rows[number][key] for key in ("question", "solution")}
        made.append({**known, "text": text, "answer": given, "right": right, "tokens": len(ids)})
    return made


def sum_up(settings: EvaluateSettings, answers: list[dict], folder: Path, left_out: int) -> dict:
    """Figures of all answers, written to `evaluation.json` with what they were compared with.

    Args:
        left_out: questions that are too long to be asked.
    """
    import pandas

    with written_whole(folder / ANSWERS) as aside:
        pandas.DataFrame(answers).to_parquet(aside)
    by_question: dict[str, list[dict]] = {}
    for row in answers:
        by_question.setdefault(row["question"], []).append(row)
    accuracy = {question: sum(r["right"] for r in rows) / len(rows) for question, rows in by_question.items()}
    figures = {f"average@{settings.samples_per_question}": bootstrap(list(accuracy.values()))}
    for k in settings.pass_at:
        passed = [pass_at_k(sum(r["right"] > 0 for r in rows), len(rows), k) for rows in by_question.values()]
        figures[f"pass@{k}"] = bootstrap(passed)
    figures["format rate"] = bootstrap([mean(r["answer"] is not None for r in rows) for rows in by_question.values()])
    figures["tokens"] = bootstrap([mean(r["tokens"] for r in rows) for rows in by_question.values()])
    result = {"questions": len(by_question), "left_out": left_out}
    result |= {"figures": {k: vars(v) for k, v in figures.items()}, "accuracy": accuracy}
    if settings.compare_with:
        other = json.loads((Path(settings.compare_with) / EVALUATION).read_text(encoding="utf-8"))
        result["difference"] = vars(paired_difference(other["accuracy"], accuracy))
        result["compared"] = len(compared(settings.compare_with, accuracy))
    write_whole(folder / EVALUATION, json.dumps(result, indent=1))
    draw(folder, result)
    return result


def logged(result: dict) -> dict[str, float]:
    """The figures by names for W&B."""
    found = {f"evaluation/{name}": value["mean"] for name, value in result["figures"].items()}
    return found | ({"evaluation/difference": result["difference"]["mean"]} if "difference" in result else {})


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def table(settings: EvaluateSettings, result: dict) -> str:
    lines = [evaluation_heading(vars(settings), result)]
    lines += [f"  {name:<12} {Estimate(**value)}" for name, value in result["figures"].items()]
    if result["left_out"]:
        limit = settings.max_prompt_length
        lines.append(f"  {result['left_out']} more questions are left out, longer than max_prompt_length={limit}")
    if "difference" in result:
        lines.append(f"  {evaluation_difference(vars(settings), result)}")
    return "\n".join([*lines, ""])


def draw(folder: Path, result: dict) -> None:
    """The rates with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = {name: Estimate(**value) for name, value in result["figures"].items() if name != "tokens"}
    figure, axis = pyplot.subplots(figsize=(1.4 * len(rates) + 1, 3.2), constrained_layout=True)
    means = [rate.mean for rate in rates.values()]
    spread = [[r.mean - r.low for r in rates.values()], [r.high - r.mean for r in rates.values()]]
    axis.bar(list(rates), means, color="#1f6f8b", width=0.5)
    axis.errorbar(list(rates), means, yerr=spread, fmt="none", ecolor="#333333", capsize=4)
    axis.set(ylim=(0, 1), title=f"{result['questions']} questions")
    axis.spines[["top", "right"]].set_visible(False)
    with written_whole(folder / EVALUATION_PICTURE) as aside:
        figure.savefig(aside, dpi=130, format="png")
    pyplot.close(figure)
