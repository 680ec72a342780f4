"""Rewards of completions that already exist.

    python score.py input=rows.jsonl output=scored.jsonl teacher_model=… student_model=…

Each row of the input (JSONL, JSON, CSV or Parquet) has `question`, `solution`, and `completion` or a list of
`completions`; optional are `teacher_system_prompt`, `student_system_prompt` and `id`. It is written as JSON with
`reward`, `solution_log_prob_reward`, `kl_reward`, `match_reward` and the reductions by name: numbers for a
`completion`, lists for `completions`, which get their `rank` and the `best_index` too. Of these a table by source
follows (a list `sources` in each row says who wrote which; else it is by place): how many questions each won, mean rank
and reward, also in `OUTPUT.ranking.json`. Reward keys are overrides, as in training; `reward_cfg` is one, too.

    python score.py input=results/collect_tiny/all/traces.parquet output=chosen.jsonl select=rsr

Without models the best completion of each question is chosen, by scores that the rows have: a student's data.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import MissingMandatoryValue

from rlt.commands.logs import set_up_logging
from rlt.data.files import read_file, readable
from rlt.durable import write_whole, written_whole
from rlt.errors import Refused, fail, usage
from rlt.generation.seeds import request_seed
from rlt.places import CFGS, looked_in
from rlt.planning.checks import check_types
from rlt.planning.configuration import REWARDS, as_dict, check_reward_names, read_overrides
from rlt.planning.machine import check_models_exist
from rlt.planning.ranges import check_ranges
from rlt.planning.reward_checks import check_reward, check_reward_options
from rlt.prompts.examples import trained_tokens
from rlt.prompts.rendering import split_completion
from rlt.prompts.styles import ReasoningFormat, load_format
from rlt.schema import REWARD_PARTS, RewardOptions, TeacherRewardConfig, own_keys, pick, picked_parts
from rlt.traces.ranking import check_select, ranks, sources_of, summary, table, worth
from rlt.traces.scored import select_scored

DTYPES = ("float32", "bfloat16")
USAGE = (
    "usage: python score.py input=ROWS.jsonl output=SCORED.jsonl teacher_model=… student_model=… [KEY=VALUE...]\n"
    "       python score.py --help"
)
MODELS = ("teacher_model", "student_model")
REQUIRED = ("question", "solution")
OPTIONAL = ("teacher_system_prompt", "student_system_prompt")


@dataclass(frozen=True)
class ScoreConfig:
    """The keys beside those of the reward."""

    input: str
    output: str
    teacher_model: str | None
    student_model: str | None
    select: str
    select_student_tokens: int | None
    seed: int
    temperature: float
    dtype: str
    reasoning_format: str
    logprob_token_budget: int
    trust_remote_code: bool


@dataclass(frozen=True)
class ScoreSettings(ScoreConfig, TeacherRewardConfig, RewardOptions):
    """The keys of a scoring."""


def checked(config: dict[str, Any]) -> ScoreSettings:
    """The settings of a configuration that can work; no model is loaded for it.

    Raises:
        Refused: it cannot.
    """
    check_types(config, (ScoreSettings, *(cls for cls, _ in REWARD_PARTS.values())))
    check_ranges(config)
    settings = pick({**config, **picked_parts(config)}, ScoreSettings)
    check_reward(settings)
    check_reward_options(settings)
    if settings.permute_rewards:
        raise Refused("permute_rewards=true: it is for training; set select=random for completions drawn by chance")
    load_format(settings.reasoning_format)
    check_selection(settings)
    if settings.temperature <= 0:
        raise Refused(f"temperature={settings.temperature} must be above 0")
    if settings.dtype not in DTYPES:
        raise Refused(f"dtype={settings.dtype}: use {' or '.join(DTYPES)}")
    if not Path(settings.input).is_file():
        raise Refused(f"input={settings.input} does not exist{looked_in(settings.input)}")
    for path in (Path(settings.output), ranking_file(Path(settings.output))):
        if path.exists():
            raise Refused(f"output={settings.output}: {path} exists and would be overwritten: name another file")
    if not Path(settings.output).absolute().parent.is_dir():
        raise Refused(f"output={settings.output}: its folder does not exist")
    check_models_exist({key: getattr(settings, key) for key in MODELS if getattr(settings, key)})
    return settings


def check_selection(settings: ScoreSettings) -> None:
    """How completions are ranked, and whether they are scored for it.

    Raises:
        Refused: the selector lacks what it selects by.
    """
    check_select(settings.select)
    named = [key for key in MODELS if getattr(settings, key)]
    if len(named) == 1:
        raise Refused(f"{named[0]} alone: name teacher_model and student_model, or neither for rows that are scored")
    if named and settings.select in ("likelihood", "rsr") and not settings.report_rsr:
        raise Refused(f"select={settings.select} needs the student's log-probs and ranks: set report_rsr=true")
    if named and settings.select_student_tokens is not None:
        raise Refused("select_student_tokens: score the rows first, then select from them without the models")


def read_lines(path: Path) -> Iterator[dict]:
    """The input's rows, each checked.

    Raises:
        Refused: names what cannot be read, or the row, the column that it lacks and those it has.
    """
    with readable(str(path)):
        rows = list(read_file(path))
    for number, row in enumerate(rows, start=1):
        for column in REQUIRED:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise Refused(f"input={path} row {number} needs a non-empty text {column!r}; it has {_columns(row)}")
        for column in OPTIONAL:
            if not isinstance(row.get(column), str | None):
                raise Refused(f"input={path} row {number}: {column} must be text, not {row[column]!r}")
        answers = _answers(row)
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise Refused(
                f"input={path} row {number} needs a text 'completion' or a list of texts 'completions'; "
                f"it has {_columns(row)}"
            )
        try:
            sources_of(row, len(answers))
        except Refused as error:
            raise Refused(f"input={path} row {number}: {error}") from None
        yield row


def _answers(row: dict) -> list[Any]:
    """Of several or one; tables have an empty cell for what a row lacks."""
    return [row.get("completion")] if row.get("completions") is None else row["completions"]


def _columns(row: dict) -> str:
    return ", ".join(sorted(map(str, row)))


def log_prob_function(model, token_budget: int):
    """Ask a loaded model for log-probs."""
    from rlt.survival.readings import lasting_log_probs

    return partial(lasting_log_probs(token_budget), model)


def load_tokenizers(settings: ScoreSettings) -> tuple[Any, Any]:
    """The teacher's and the student's, which may be one.

    Raises:
        Refused: one cannot be loaded, or its template cannot be read by.
    """
    from rlt.models.loading import load_tokenizer
    from rlt.models.paths import resolve_model_path
    from rlt.prompts.tokenizers import check_template, load_student_tokenizer

    style = load_format(settings.reasoning_format)
    teacher, student = (resolve_model_path(getattr(settings, key)) for key in MODELS)
    tokenizer = load_tokenizer(teacher, settings.trust_remote_code)
    check_template(style, tokenizer)
    if teacher == student:
        return tokenizer, tokenizer
    return tokenizer, load_student_tokenizer(student, tokenizer, style, settings.trust_remote_code)


def build_reward(settings: ScoreSettings, tokenizers: tuple[Any, Any]):
    """The teacher reward over the two models of the configuration, and the student.

    Args:
        tokenizers: as `load_tokenizers` gives them.
    """
    import torch

    from rlt.models.devices import on
    from rlt.models.loading import check_vocabulary, load_frozen, load_student
    from rlt.models.paths import resolve_model_path
    from rlt.rewards import TeacherReward
    from rlt.survival.readings import lasting_ranked_log_probs

    dtype = getattr(torch, settings.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = [resolve_model_path(getattr(settings, key)) for key in MODELS]
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
    teacher = on(device, load_frozen(paths[0], **options))
    check_vocabulary(teacher, tokenizers[0], paths[0])
    student = teacher if paths[0] == paths[1] else on(device, load_student(paths[1], tokenizers[1], **options))
    reward = TeacherReward(
        tokenizers[0],
        load_format(settings.reasoning_format),
        settings,
        settings.temperature,
        log_prob_function(teacher, settings.logprob_token_budget),
        log_prob_function(student, settings.logprob_token_budget),
        tokenizers[1],
        partial(lasting_ranked_log_probs(settings.logprob_token_budget), student) if settings.report_rsr else None,
    )
    return reward, student


def added_terms(settings: ScoreSettings, student, tokenizer):
    """What `reward_cfg` adds to the rewards."""
    from rlt.generation.answering import write_answers
    from rlt.rewards.terms import AddedTerms

    style = load_format(settings.reasoning_format)

    def write(prompts, seeds):
        assert settings.generated is not None
        return write_answers(
            student, tokenizer, style, settings.generated, prompts, seeds, settings.logprob_token_budget
        )

    return AddedTerms(settings, style, tokenizer, write)


def contexts(settings: ScoreSettings) -> dict[str, int]:
    """Tokens of the longest text that each model takes, by key; a model without a limit has none."""
    from transformers import AutoConfig

    from rlt.models.paths import resolve_model_path

    found = {}
    for key in MODELS:
        path = resolve_model_path(getattr(settings, key))
        its = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code).get_text_config()
        if (limit := getattr(its, "max_position_embeddings", None)) is not None:
            found[key] = limit
    return found


def check_readings(settings: ScoreSettings, rows: list[dict], tokenizers: tuple[Any, Any]) -> None:
    """That every row can be read and is short enough, before a model is loaded.

    Raises:
        Refused: names the row.
    """
    from rlt.rewards import TeacherReward

    style, longest = load_format(settings.reasoning_format), contexts(settings)
    teacher, student = tokenizers
    reader = TeacherReward(teacher, style, settings, settings.temperature, _not_asked, _not_asked, student)
    for number, row in enumerate(rows, start=1):
        readings = reader.read([row] * len(_answers(row)), _answers(row))
        check_context(f"input={settings.input} row {number}", readings, longest)


def _not_asked(*_) -> list:
    raise AssertionError("texts are read here, and not scored")


def check_context(place: str, readings: list, longest: dict[str, int]) -> None:
    """Refuse a row with a text that is longer than a model's context.

    Args:
        readings: of the row's completions.
        longest: as `contexts` gives it.

    Raises:
        Refused: names the row, its completion, and the model.
    """
    for number, reading in enumerate(readings, start=1):
        for key, text in (("teacher_model", reading.teacher), ("student_model", reading.student)):
            if len(text.ids) > longest.get(key, len(text.ids)):
                raise Refused(
                    f"{place}: with completion {number} the text has {len(text.ids)} tokens, and the context of {key} "
                    f"{longest[key]}: shorten the row or leave it out"
                )


def select_file(settings: ScoreSettings) -> str:
    """Write the best completion of each question, by scores that the rows have. Returns what to say of it."""
    rows = list(read_lines(Path(settings.input)))
    style = load_format(settings.reasoning_format)
    how = settings.select, settings.seed, settings.select_student_tokens
    kept, dropped = select_scored(rows, style, *how, f"input={settings.input}")
    with written_whole(Path(settings.output)) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in kept)
    said = "".join(f"; out: {count} {reason}" for reason, count in dropped.items())
    return f"{len(kept)} of {len(rows)} rows selected by {settings.select}, written to {settings.output}{said}\n"


def score_file(settings: ScoreSettings) -> str:
    """Score every line; the output appears when all of it is written. Returns what to say of it."""
    rows = list(read_lines(Path(settings.input)))
    if not rows:
        raise Refused(f"input={settings.input} has no line to score")
    tokenizers = load_tokenizers(settings)
    check_readings(settings, rows, tokenizers)
    reward, student = build_reward(settings, tokenizers)
    terms = added_terms(settings, student, tokenizers[1])
    output = Path(settings.output)
    count, ranked = 0, []
    with written_whole(output) as aside, aside.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            answers = _answers(row)
            readings = reward.read([row] * len(answers), answers)
            seeds = [request_seed(settings.seed, "score", number, place) for place in range(len(answers))]
            scored = terms([row] * len(answers), answers, readings, reward.score_readings(readings), seeds)
            scored = [s.as_dict() for s in scored]
            if settings.report_rsr:
                sizes = sizes_of(row, answers, readings, tokenizers[1] or tokenizers[0], reward.style)
                scored = [{**one, **size} for one, size in zip(scored, sizes, strict=True)]
            named = {name: [s[name] for s in scored] for name in scored[0]}
            if row.get("completions") is not None:
                each = [{"question": row["question"], **one} for one in scored]
                values = [worth(one, settings.select, settings.seed, place) for place, one in enumerate(each)]
                places = ranks(values)
                added = {**named, "rank": places, "best_index": best_index(values, places)}
                ranked.append((sources_of(row, len(answers)), named["reward"]))
            else:
                added = {name: values[0] for name, values in named.items()}
            file.write(json.dumps({**row, **added}, default=str) + "\n")  # of times and the like in Parquet
            count += len(answers)
    said = f"{count} completions scored, written to {output}\n"
    if not ranked:
        return said
    found = summary(ranked)
    write_whole(ranking_file(output), json.dumps(found, indent=1))
    return said + table(found)


def sizes_of(row: dict, answers: list[str], readings, tokenizer, style: ReasoningFormat) -> list[dict[str, int]]:
    """Of each answer: tokens that the student reads, and those that it would be trained on."""
    traces = [split_completion(style, answer)[0].strip() for answer in answers]
    trained = [trained_tokens(tokenizer, style, trace, row["solution"]) for trace in traces]
    read = [len(reading.student.ids) for reading in readings]
    return [{"student_tokens": a, "trained_tokens": b} for a, b in zip(read, trained, strict=True)]


def best_index(rewards: list[float], places: list[int]) -> int | None:
    """Index of the completion ranked first; None where none has a finite reward."""
    return places.index(1) if any(map(math.isfinite, rewards)) else None


def ranking_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.ranking.json")


@hydra.main(version_base="1.3", config_path=str(CFGS), config_name="score")
def job(cfg) -> None:
    set_up_logging()
    try:
        settings = checked(as_dict(cfg, throw_on_missing=True))
        said = score_file(settings) if settings.teacher_model else select_file(settings)
    except MissingMandatoryValue as error:
        fail(ValueError(f"{error.full_key} is not given: input and output are needed"))
    except Refused as error:
        fail(error)
    sys.stdout.write(said)


def arguments_for_hydra(arguments: list[str]) -> list[str]:
    """The same, with a reward where Hydra has its group.

    Raises:
        Refused: an unknown key, or no such reward.
    """
    rewritten = []
    for argument in arguments:
        for _, name, value in read_overrides([argument], {*own_keys(ScoreSettings), "reward_cfg"}):
            if name == "reward_cfg":
                check_reward_names(value)
                argument = f"{REWARDS}={value}"
        rewritten.append(argument)
    return rewritten


def main() -> None:
    if len(sys.argv) == 1:
        usage(USAGE)
    try:
        sys.argv[1:] = arguments_for_hydra(sys.argv[1:])
    except Refused as error:
        fail(error)
    job()
