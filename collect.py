"""A teacher answers every question several times; its traces are scored, ranked and filtered into a student's data.

    ./launch_mono.sh collect_tiny model_name_or_path=results/teacher_rlt_tiny        (launch.sh: on several devices)

Leaves `traces.parquet` and `traces.jsonl` (what a student is trained on), `all/traces.parquet` (every completion with
its rewards and rank) and `DATA_CARD.md` in the output folder. Questions are worked on in parts, each written at once:
after a kill the same command goes on with the next part. In float32 parts are the same on any number of devices.
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from data.formats import ReasoningFormat, load_format
from data.prompts import prompt_token_ids, split_completion
from generation import request_seed
from plan import MARKER, Plan
from schema import DataConfig, TeacherRewardConfig, TraceConfig, pick
from traces.card import write_card
from traces.selection import rank, select

PARTS = "parts"


def run(plan: Plan, stop) -> None:
    """Collect what is missing, as one rank of however many; the first one then puts it together.

    Args:
        stop: a `StopOnSignal`, asked between two parts.
    """
    from generation.sampler import Sampler
    from trainers.build import quiet_libraries
    from trainers.rows import load_split_rows, teaching_rows

    config = plan.config
    quiet_libraries()
    style, data, folder = load_format(config["reasoning_format"]), pick(config, DataConfig), Path(config["output_dir"])
    (folder / PARTS).mkdir(exist_ok=True)
    sampler = Sampler(config)
    rows = teaching_rows(load_split_rows(data, style)[0], sampler.tokenizer, style, data)
    work_on_parts(config, sampler, style, rows, folder, stop)
    stop.leave_together()
    if sampler.accelerator.is_main_process:
        count = finish(config, rows, folder)
        (folder / MARKER).write_text(json.dumps({"traces": count}))


def parts_of(count: int, size: int) -> list[range]:
    """Which rows belong to each part, whatever the number of devices: what runs at once decides the last bits."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def part_file(folder: Path, number: int) -> Path:
    return folder / PARTS / f"{number:05d}.jsonl"


def work_on_parts(config: dict, sampler, style: ReasoningFormat, rows: list[dict], folder: Path, stop) -> None:
    """This rank's parts that are not there yet."""
    parts = parts_of(len(rows), config["questions_at_once"])
    accelerator = sampler.accelerator
    mine = range(accelerator.process_index, len(parts), accelerator.num_processes)
    missing = [number for number in mine if not part_file(folder, number).is_file()]
    if not missing:
        return
    scorer = build_scorer(config, sampler, style)
    for number in tqdm(missing, unit="part", disable=not accelerator.is_main_process, dynamic_ncols=True):
        if stop.asked:
            return
        made = answer(config, sampler, scorer, style, rows, parts[number])
        file = part_file(folder, number)
        aside = file.with_suffix(".tmp")
        aside.write_text("".join(f"{json.dumps(row)}\n" for row in made), encoding="utf-8")
        os.replace(aside, file)


def build_scorer(config: dict, sampler, style: ReasoningFormat):
    from models.loading import load_frozen, resolve_model_path
    from traces.scoring import TraceScorer

    path = resolve_model_path(config["student_model"])
    student = sampler.model
    if path != resolve_model_path(config["model_name_or_path"]):
        student = load_frozen(path, dtype=sampler.dtype, trust_remote_code=config["trust_remote_code"])
        student.to(sampler.accelerator.device)
    return TraceScorer(
        sampler.tokenizer,
        style,
        pick(config, TeacherRewardConfig),
        sampler.model,
        student,
        config["temperature"],
        config["logprob_token_budget"],
    )


def answer(config: dict, sampler, scorer, style: ReasoningFormat, rows: list[dict], part: range) -> list[dict]:
    """Every completion of a part's questions, scored."""
    from trainers.checkpoints import kill_point

    count = config["traces_per_question"]
    asked = [number for number in part for _ in range(count)]
    prompts = prompt_token_ids(sampler.tokenizer, [rows[number]["prompt"] for number in asked])
    seeds = [request_seed(config["seed"], "collect", number) + member for number in part for member in range(count)]
    kill_point("collecting")
    sampled, log_probs = sampler(prompts, seeds)
    texts, scored = scorer.score([rows[number] for number in asked], prompts, sampled, log_probs)
    kill_point("scoring")
    made = []
    for number, text, ids, score, reading in zip(asked, texts, sampled, scored, scorer.readings, strict=True):
        known = {key: value for key, value in rows[number].items() if key not in ("prompt", "reasoning_trace")}
        trace = split_completion(style, text)[0].strip()
        sizes = {"tokens": len(ids), "student_tokens": len(reading.student.ids)}
        made.append(
            {"question_id": number, **known, "completion": text, "reasoning_trace": trace, **sizes, **score.as_dict()}
        )
    return made


def finish(config: dict, rows: list[dict], folder: Path) -> int:
    """Rank, filter and write everything; returns how many traces are left."""
    import pandas

    parts = range(len(parts_of(len(rows), config["questions_at_once"])))
    lines = [line for number in parts for line in part_file(folder, number).read_text(encoding="utf-8").splitlines()]
    ranked = rank([json.loads(line) for line in lines])
    selection = select(ranked, pick(config, TraceConfig))
    style = load_format(config["reasoning_format"])
    kept = [{**row, "messages": messages(style, row)} for row in selection.kept]
    (folder / "all").mkdir(exist_ok=True)
    pandas.DataFrame(ranked).to_parquet(folder / "all" / "traces.parquet")
    pandas.DataFrame(kept).to_parquet(folder / "traces.parquet")
    text = "".join(f"{json.dumps(row)}\n" for row in kept)
    (folder / "traces.jsonl").write_text(text, encoding="utf-8")
    write_card(folder / "DATA_CARD.md", config, selection)
    return len(kept)


def messages(style: ReasoningFormat, row: dict) -> list[dict[str, str]]:
    """The conversation that a student learns, for trainers that take chats."""
    from data.prompts import student_answer

    return [
        {"role": "system", "content": row.get("student_system_prompt") or style.student_system},
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": student_answer(style, row["reasoning_trace"], row["solution"])},
    ]
