"""The method's claim in miniature: do students learn more from the traces of a teacher that was trained for it?

    .venv/bin/python benchmarks/replication --out DIR          (continues where it was stopped)

A novice learns the format of answers on another task; every student starts from it. For each seed a few worked
solutions warm up a teacher, and make of the novice the frozen student of the reward; the teacher is trained with GRPO.
Students of the same number of trained tokens learn from unedited samples of the teacher early in its warm-up, after
it and after GRPO, and from the generator's own worked solutions, and answer questions that no run has seen. Leaves
`replication.json`, `replication.md` and `replication.png`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import outcome
import rows

from rlt.errors import Refused, fail
from rlt.jobs.child import run_child
from rlt.jobs.pipeline import Stage, configuration_of
from rlt.places import ROOT
from rlt.runs.folder import is_complete

EARLY, WARMUP_STEPS = 4, 6  # after which a teacher is sampled
STEPS = 20  # of GRPO
SHORT = ["max_prompt_length=384", "report_to=null"]
SAMPLING = ["temperature=1.0", "max_completion_length=96"]  # of teachers, in GRPO and when traces are collected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    out, seeds = options.out.absolute(), range(1, options.seeds + 1)
    os.chdir(ROOT)
    try:
        rows.write_questions(out / "questions", seeds)
        evaluate(out, rows.MODEL, out / "base" / "evaluation")
        novice = train_novice(out, seeds[0])
        for seed in seeds:
            one_seed(out, seed, novice)
    except Refused as error:
        fail(error)
    sys.stdout.write(outcome.write(out, seeds))


def train_novice(out: Path, seed: int) -> Path:
    novice = out / "novice" / "student"
    stage("student_sft_tiny", novice, seed, out / "questions" / str(seed) / "format.jsonl", "max_steps=10")
    evaluate(out, novice, out / "novice" / "evaluation")
    return novice


def one_seed(out: Path, seed: int, novice: Path) -> None:
    """Teachers, their traces, and a student of each set."""
    folder, questions = out / str(seed), out / "questions" / str(seed)
    reader = folder / "reader"
    stage("student_sft_tiny", reader, seed, questions / "warmup.jsonl", "max_steps=8", f"model_name_or_path={novice}")
    teachers = train_teachers(folder, questions, seed, reader)
    for name, model in teachers.items():
        collect(folder / name / "traces", questions, seed, model, reader)
    sets = {name: rows.unedited(folder / name / "traces") for name in teachers}
    sets["worked"] = rows.read(questions / "collect.jsonl")
    rows.write_equal(sets, folder / "equal")
    for name in sets:
        learn(folder / name / "student", folder / "equal" / f"{name}.jsonl", seed, novice)
        evaluate(out, folder / name / "student", folder / name / "evaluation")
        for checkpoint in set((folder / name).glob("*/checkpoint-*")) - set(teachers.values()):
            shutil.rmtree(checkpoint)  # gigabytes, and all that needs them is complete


def train_teachers(folder: Path, questions: Path, seed: int, reader: Path) -> dict[str, Path]:
    """Models by the name of their trace set."""
    warmup, teacher = folder / "warmup" / "teacher", folder / "rl" / "teacher"
    steps = [f"max_steps={WARMUP_STEPS}", f"save_steps={EARLY}", "save_total_limit=2"]
    stage("teacher_sft_tiny", warmup, seed, questions / "warmup.jsonl", *steps)
    stage(
        "teacher_rlt_tiny",
        teacher,
        seed,
        questions / "teach.jsonl",
        *SHORT,
        f"model_name_or_path={warmup}",
        f"student_model={reader}",
        *SAMPLING,
        "learning_rate=2e-5",
        f"max_steps={STEPS}",
        f"save_steps={STEPS}",
        "eval_size=16",
    )
    return {"early": warmup / f"checkpoint-{EARLY}", "warmup": warmup, "rl": teacher}


def collect(folder: Path, questions: Path, seed: int, model: Path, reader: Path) -> None:
    """One trace of each question, none filtered out before it is read again."""
    every = [*SAMPLING, "traces_per_question=1", "min_format_rate=0", "questions_at_once=192"]
    models = [f"model_name_or_path={model}", f"student_model={reader}"]
    stage("collect_tiny", folder, seed, questions / "collect.jsonl", *SHORT, *models, *every)


def learn(folder: Path, traces: Path, seed: int, novice: Path) -> None:
    whole = ["eval_size=0", "eval_steps=null", "load_best_model_at_end=false", "num_train_epochs=1", "save_steps=100"]
    stage("student_distill_tiny", folder, seed, traces, f"model_name_or_path={novice}", *whole)


def evaluate(out: Path, model: Path | str, folder: Path) -> None:
    """Two answers to each question that no run has seen."""
    asked = ["samples_per_question=2", "pass_at=[1]", "questions_at_once=160", "max_completion_length=160"]
    named = f"model_name_or_path={model}"
    stage("evaluate_tiny", folder, 0, out / "questions" / "evaluate.jsonl", *SHORT, named, *asked)


def stage(run: str, folder: Path, seed: int, source: Path, *overrides: str) -> None:
    """A run in a process of its own, unless it is complete; a folder of other settings is refused."""
    place = [f"output_dir={folder}", f"seed={seed}", f"dataset_id_or_path={source}", "dataset_size=null"]
    its = Stage(str(folder), str(folder), [run, *place, *overrides])
    if not is_complete(configuration_of(its, [], devices=1)):
        run_child(["train.py", *its.arguments])


if __name__ == "__main__":
    main()
