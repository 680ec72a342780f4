"""A teacher answers every question several times; its traces are scored, ranked and filtered into a student's data.

    ./launch_mono.sh collect_tiny model_name_or_path=results/teacher_rlt_tiny        (launch.sh: on several devices)

Leaves `traces.parquet` and `traces.jsonl` (what a student is trained on), `all/traces.parquet` (every completion with
its rewards and rank), `held_out.jsonl` (with `eval_size`) and `DATA_CARD.md` in the output folder. Questions are worked
on in parts, each written at once: after a kill the same command goes on with the next part. In float32 parts are the
same on any number of devices.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rlt.data.sources import KNOWN, Rows
from rlt.durable import as_json_lines, write_whole, written_whole
from rlt.generation.seeds import request_seed
from rlt.planning.plan import Plan
from rlt.prompts.examples import trained_tokens
from rlt.prompts.rendering import prompt_token_ids, split_completion
from rlt.prompts.styles import ReasoningFormat, load_format
from rlt.reports.result import traces_sentence
from rlt.runs.dashboard import log_figures
from rlt.runs.folder import ALL_TRACES, CARD, PARTS, TRACES, TRACES_AS_LINES, mark_complete
from rlt.runs.learned import check_held_out, write_held_out
from rlt.runs.parts import Parts
from rlt.schema import CollectSettings
from rlt.traces.card import write_card
from rlt.traces.ranking import check_columns
from rlt.traces.selection import Selection, check_format, rank, select

DEVIATIONS = 3.3  # one part in 2,000 of a teacher that just has the format often enough falls short by more


def run(plan: Plan, stop) -> None:
    """Collect what is missing, as one rank of however many; the first one then puts it together.

    Args:
        stop: a `StopOnSignal`, asked between two parts.
    """
    from rlt.generation.sampler import Sampler
    from rlt.models.loading import quiet_libraries

    settings: CollectSettings = plan.settings
    quiet_libraries()
    style, folder = load_format(settings.reasoning_format), Path(settings.output_dir)
    sampler = Sampler(settings)
    student_tokenizer = its_tokenizer(settings, sampler.tokenizer, style)
    asked, held_out = questions(settings, sampler.tokenizer, style, student_tokenizer)
    check_held_out(folder, held_out)
    parts = Parts(folder, len(asked.rows), settings.questions_at_once)
    parts.keep_to(sampler.accelerator, plan.config, asked.rows, style)
    if held_out and sampler.accelerator.is_main_process:
        write_held_out(folder, held_out)
    if parts.missing(sampler.accelerator):
        scorer, pace = build_scorer(settings, sampler, style, student_tokenizer), Pace()
        terms = added_terms(settings, scorer, style)

        def make(part: range) -> list[dict]:
            if first := parts.first():  # a teacher without the format is noticed there, not after all of them
                check_format(sum(row["matched"] for row in first), len(first), settings.min_format_rate, DEVIATIONS)
            return answer(settings, sampler, scorer, terms, style, asked.rows, part, pace)

        stop.begin()
        parts.work(sampler.accelerator, stop, make)
        if sampler.accelerator.is_main_process:
            sys.stdout.write(f"{settings.run_name}: {pace}\n")
    stop.leave_together()
    if sampler.accelerator.is_main_process:
        selection = finish(plan, parts.read(), folder, asked)
        log_figures(plan.config, logged(selection))
        mark_complete(folder, {"traces": len(selection.kept)})
        kept = traces_sentence(len(selection.kept), selection.scored, selection.format_rate)
        sys.stdout.write(f"{settings.run_name}: {kept}; in {folder}\n")


def its_tokenizer(settings: CollectSettings, tokenizer, style: ReasoningFormat):
    """What the student reads with; the teacher's tokenizer where it is the student."""
    from rlt.models.paths import resolve_model_path
    from rlt.prompts.tokenizers import load_student_tokenizer

    assert settings.student_model is not None  # the plan refuses it
    path = resolve_model_path(settings.student_model)
    if path == resolve_model_path(settings.model_name_or_path):
        return tokenizer
    return load_student_tokenizer(path, tokenizer, style, settings.trust_remote_code)


def questions(
    settings: CollectSettings, tokenizer, style: ReasoningFormat, student_tokenizer=None
) -> tuple[Rows, list[dict]]:
    """What the teacher is asked, with how many other rows were read, by why they are left out; and what is held out."""
    from rlt.prompts.rows import load_split_rows, teaching_rows

    usable, held_out, left_out = load_split_rows(settings, style)
    asked = teaching_rows(usable, tokenizer, style, settings, student_tokenizer)
    return Rows(asked.rows, {**left_out, **asked.dropped}), held_out


@dataclass
class Pace:
    """How fast traces were made."""

    tokens: int = 0
    sampling_s: float = 0.0
    scoring_s: float = 0.0

    def __str__(self) -> str:
        if not self.sampling_s:
            return "nothing sampled"
        rate, share = self.tokens / self.sampling_s, self.scoring_s / self.sampling_s
        return f"{self.tokens} tokens sampled at {rate:.0f} per second; scoring added {share:.0%}"


def build_scorer(settings: CollectSettings, sampler, style: ReasoningFormat, student_tokenizer):
    from rlt.models.loading import load_student
    from rlt.models.paths import resolve_model_path
    from rlt.survival.readings import lasting_log_probs, lasting_ranked_log_probs
    from rlt.traces.scoring import TraceScorer

    assert settings.student_model is not None  # the plan refuses it
    path = resolve_model_path(settings.student_model)
    student = sampler.model
    if path != resolve_model_path(settings.model_name_or_path):
        options = {"dtype": sampler.dtype, "trust_remote_code": settings.trust_remote_code}
        student = load_student(path, student_tokenizer, **options)
        student.to(sampler.accelerator.device)
    return TraceScorer(
        sampler.tokenizer,
        style,
        settings,
        sampler.model,
        student,
        sampler.next_token_log_probs,
        settings.temperature,
        lasting_log_probs(settings.logprob_token_budget),
        student_tokenizer,
        lasting_ranked_log_probs(settings.logprob_token_budget) if settings.report_rsr else None,
    )


def added_terms(settings: CollectSettings, scorer, style: ReasoningFormat):
    """What `reward_cfg` adds to the traces' rewards; its answers are the scorer's student's."""
    from rlt.generation.answering import write_answers
    from rlt.rewards.terms import AddedTerms

    def write(prompts, seeds):
        assert settings.generated is not None
        how = scorer.reward.student_tokenizer, style, settings.generated
        return write_answers(scorer.student, *how, prompts, seeds, settings.logprob_token_budget)

    return AddedTerms(settings, style, scorer.reward.student_tokenizer, write, settings.ddp_timeout)


def answer(
    settings: CollectSettings, sampler, scorer, terms, style: ReasoningFormat, rows: list[dict], part: range, pace: Pace
) -> list[dict]:
    """Every completion of a part's questions, scored."""
    from rlt.rewards.tokens import token_columns
    from rlt.survival.kill_points import kill_point

    count = settings.traces_per_question
    asked = [number for number in part for _ in range(count)]
    prompts = prompt_token_ids(sampler.tokenizer, [rows[number]["prompt"] for number in asked])
    seeds = [request_seed(settings.seed, "collect", number) + member for number in part for member in range(count)]
    kill_point("collecting")
    begun = time.monotonic()
    sampled, log_probs = sampler(prompts, seeds)
    sampled_at = time.monotonic()
    texts, scored = scorer.score([rows[number] for number in asked], prompts, sampled, log_probs)
    known = [rows[number] for number in asked]
    scored = terms(known, texts, scorer.readings, scored, [request_seed(seed, "answers") for seed in seeds])
    kill_point("scoring")
    pace.tokens += sum(map(len, sampled))
    pace.sampling_s += sampled_at - begun
    pace.scoring_s += time.monotonic() - sampled_at
    made = []
    shown = token_columns(scorer.reward.student_tokenizer, scorer.readings, scored)
    columns = zip(asked, texts, sampled, scored, scorer.readings, shown, strict=True)
    for number, text, ids, score, reading, tokens in columns:
        known = {key: value for key, value in rows[number].items() if key in KNOWN and key != "reasoning_trace"}
        trace = split_completion(style, text)[0].strip()
        trained = trained_tokens(scorer.reward.student_tokenizer, style, trace, rows[number]["solution"])
        sizes = {"tokens": len(ids), "student_tokens": len(reading.student.ids), "trained_tokens": trained}
        written = {"completion": text, "reasoning_trace": trace, "matched": reading.matched, "token_scores": tokens}
        made.append({"question_id": number, **known, **written, **sizes, **score.as_dict()})
    return made


def finish(plan: Plan, scored: list[dict], folder: Path, asked: Rows) -> Selection:
    """Rank, filter and write everything."""
    import pandas

    check_columns(scored, plan.settings.select, f"{folder}/{PARTS}")
    ranked = rank(scored, plan.settings.select, plan.settings.seed)
    (folder / ALL_TRACES).parent.mkdir(exist_ok=True)
    with written_whole(folder / ALL_TRACES) as aside:
        pandas.DataFrame(ranked).to_parquet(aside)
    selection = select(ranked, plan.settings)  # may refuse, and the traces are there to look at
    style = load_format(plan.settings.reasoning_format)
    kept = [{**without(row, "token_scores"), "messages": messages(style, row)} for row in selection.kept]
    with written_whole(folder / TRACES) as aside:
        pandas.DataFrame(kept).to_parquet(aside)
    write_whole(folder / TRACES_AS_LINES, as_json_lines(kept))
    write_card(folder / CARD, plan.config, asked, selection)
    return selection


def logged(selection: Selection) -> dict[str, float]:
    """What W&B is told."""
    rewards = [row["reward"] for row in selection.kept]
    counts = {"traces/scored": selection.scored, "traces/kept": len(rewards)}
    return {**counts, "traces/format_rate": selection.format_rate, "traces/reward": sum(rewards) / len(rewards)}


def without(row: dict, column: str) -> dict:
    return {key: value for key, value in row.items() if key != column}


def messages(style: ReasoningFormat, row: dict) -> list[dict[str, str]]:
    """The conversation that a student learns, for trainers that take chats."""
    from rlt.prompts.rendering import student_answer

    return [
        {"role": "system", "content": row.get("student_system_prompt") or style.student_system},
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": student_answer(style, row["reasoning_trace"], row["solution"])},
    ]
