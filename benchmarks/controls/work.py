"""The runs of one seed: novice, the reward's student, teachers, explanations, students, their answers.

A run that is complete is not made again; what an arm's result stands on is deleted with it, and what several arms need
is deleted when the seed is done.
"""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import measures
import pandas
import rows
import settings
from arms import KNOWN, TEACHERS, Arm

from rlt.estimates import bootstrap, finite_mean
from rlt.jobs.child import run_child
from rlt.jobs.pipeline import Stage, configuration_of
from rlt.runs.folder import ALL_TRACES, EVALUATION, METRICS, is_complete

SHORT = ["max_prompt_length=384"]
EXPLAINING = ["temperature=1.0", f"max_completion_length={settings.EXPLANATION_TOKENS}"]
ANSWERING = ["temperature=1.0", f"max_completion_length={settings.ANSWER_TOKENS}"]
LOGGED = ["logging_steps=1", "save_steps=1000", "eval_size=0", "eval_steps=null"]


class Seed:
    """One seed's runs below `out`, a folder of one commit of the code and one copy of the settings."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed, self.folder = out, seed, out / str(seed)
        rows.write_questions(out / "questions", seed)
        self.questions = out / "questions" / str(seed)

    def figures(self, name: str) -> dict[str, Any]:
        """What came of an arm; its runs are made as far as they are missing."""
        arm = KNOWN[name]
        if arm.kind == "base":
            return self.answered(settings.MODEL, self.folder / name)
        folder = self.folder / name
        made = {"grpo": self.by_itself, "opd": self.on_policy}.get(arm.kind, self.taught)(arm, folder)
        found = {**made, **self.answered(folder / "student", folder)}
        shutil.rmtree(folder)
        return found

    @cached_property
    def novice(self) -> Path:
        """Knows the format of answers, from another task."""
        source = self.questions / "format.jsonl"
        return self.learn(self.folder / "novice", source, settings.MODEL, f"max_steps={settings.NOVICE_STEPS}")

    @cached_property
    def reader(self) -> Path:
        """The student of the reward: the novice after a few worked solutions."""
        source = self.questions / "warmup.jsonl"
        return self.learn(self.folder / "reader", source, self.novice, f"max_steps={settings.READER_STEPS}")

    @cached_property
    def beginner(self) -> Path:
        """The novice after a share of the tokens that others train on, of the warm-up teacher's explanations: what a
        student that learns from its own samples needs, since a novice has next to no answers and loses its format."""
        read = rows.as_rows(rows.explanations(self.explained("warm-up", 1)))
        folder = self.folder / "beginner"
        rows.write(folder / "rows.jsonl", rows.to_tokens(read, settings.BEGINNING_TOKENS))
        return self.learn(folder / "student", folder / "rows.jsonl", self.novice, "num_train_epochs=1")

    def teacher(self, name: str) -> Path:
        """A teacher of `TEACHERS`; `mismatched` has the next seed's student of the reward."""
        folder, training = self.folder / "teachers" / name, TEACHERS[name]
        if not training:
            return self.stage("teacher_sft_tiny", folder, "warmup.jsonl", f"max_steps={settings.WARMUP_STEPS}")
        reader = Seed(self.out, self.seed + 1).reader if name == "mismatched" else self.reader
        trained = self.stage(
            "teacher_rlt_tiny",
            folder,
            "teach.jsonl",
            f"model_name_or_path={self.teacher('warm-up')}",
            f"student_model={reader}",
            *SHORT,
            *EXPLAINING,
            f"learning_rate={settings.TEACHER_RATE}",
            *LOGGED,
            f"max_steps={settings.RL_STEPS}",
            *training,
        )
        return without_checkpoints(trained)

    def explained(self, teacher: str, of: int) -> Path:
        """A collection: so many explanations of each question, none filtered out before it is read."""
        folder = self.folder / "explained" / f"{teacher}-{of}"
        models = [f"model_name_or_path={self.teacher(teacher)}", f"student_model={self.reader}"]
        asked = [f"traces_per_question={of}", "min_format_rate=0", "questions_at_once=192"]
        try:
            self.stage("collect_tiny", folder, "collect.jsonl", *SHORT, *EXPLAINING, *models, *asked)
        except SystemExit:  # a teacher that has lost its format keeps no trace, and is learned from all the same
            if not (folder / ALL_TRACES).is_file():
                raise
        return folder

    def taught(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """A student of explanations, or of worked solutions, and what is measured of these."""
        if arm.kind == "worked":
            read, of_teacher = rows.read(self.questions / "collect.jsonl"), {}
        else:
            explained = rows.explanations(self.explained(arm.teacher, arm.of))
            read, of_teacher = rows.as_rows(explained), self.of_explanations(arm, explained)
        if arm.edit is not None:
            of_teacher = {}  # which are of the texts as they were sampled
            read = [{**row, "reasoning_trace": arm.edit(row["reasoning_trace"], row["question"])} for row in read]
        learned = rows.to_tokens(read, arm.tokens)
        rows.write(folder / "rows.jsonl", learned)
        student = self.learn(folder / "student", folder / "rows.jsonl", self.novice, "num_train_epochs=1")
        whole = self.of_every_question(folder / "whole", read) if arm.whole else {}
        texts, ways = [row["reasoning_trace"] for row in read], [measures.worked_of(row) for row in read]
        return {
            **of_teacher,
            **whole,
            "rows": len(learned),
            "questions": len({row["question"] for row in learned}),
            "steps": self.logged(student)[-1]["step"],
            "right steps of explanations": measures.right_steps(texts, ways),
            "position of the answer": measures.answer_position(texts, [row["solution"] for row in read]),
        }

    def of_every_question(self, folder: Path, read: list[dict]) -> dict[str, float]:
        """Accuracy of a student that learns from every row once."""
        rows.write(folder / "rows.jsonl", read)
        student = self.learn(folder / "student", folder / "rows.jsonl", self.novice, "num_train_epochs=1")
        return {measures.EVERY_QUESTION: self.answered(student, folder)["accuracy"]}

    def of_explanations(self, arm: Arm, explained: list[dict]) -> dict[str, float]:
        """Mean reward, RSR and length as they were sampled, and the entropy of a teacher that GRPO trained."""
        found = {
            "reward": finite_mean(row["reward"] for row in explained),
            "rsr": finite_mean(row["rsr"] for row in explained),
            "tokens of explanations": finite_mean(row["tokens"] for row in explained),
            "format rate of explanations": finite_mean(float(row["matched"]) for row in explained),
        }
        logged = [one["entropy"] for one in self.logged(self.teacher(arm.teacher)) if "entropy" in one]
        return found | ({"entropy": logged[-1]} if TEACHERS[arm.teacher] and logged else {})

    def by_itself(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """The beginner trained by GRPO, until it has sampled as many tokens as the teacher had."""
        wanted = self.sampled(self.teacher(arm.teacher), settings.RL_STEPS, settings.BATCH)
        given = [f"learning_rate={settings.TEACHER_RATE}"]
        return self.until("grpo_verifier_tiny", folder / "student", "teach.jsonl", given, wanted, settings.BATCH)

    def on_policy(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """The beginner distilled on its own samples, until both together are as many tokens as others train on."""
        given = [f"teacher_model={self.teacher(arm.teacher)}", f"learning_rate={settings.DISTILLED_RATE}"]
        given.append(f"learns_solution={settings.OPD_LEARNS_SOLUTION}")
        wanted = settings.TRAINED_TOKENS - settings.BEGINNING_TOKENS
        return self.until(
            "student_opd_tiny", folder / "student", "collect.jsonl", given, wanted, settings.DISTILLED_BATCH
        )

    def until(
        self, run: str, folder: Path, source: str, given: list[str], tokens: float, batch: int
    ) -> dict[str, float]:
        """A run of the beginner that goes on, some steps each time, until it has sampled so many tokens; how many it
        has, in how many steps."""
        given = [*given, f"model_name_or_path={self.beginner}", "warmup_run=null", "lr_scheduler_type=constant"]
        given += [f"train_batch_size={batch}", "per_device_train_batch_size=8"]
        steps, done = 0, 0.0
        while done < tokens:
            steps += max(1, int((tokens - done) / max(done / steps, 1) * 0.9)) if steps else 2
            self.stage(run, folder, source, *given, *LOGGED, *SHORT, *ANSWERING, f"max_steps={steps}")
            done = self.sampled(folder, steps, batch)
        without_checkpoints(folder)
        return {"sampled tokens": done, "steps": steps}

    def sampled(self, folder: Path, steps: int, batch: int) -> float:
        """Tokens that a run's policy has sampled in its first steps; a life that was killed may have logged more."""
        lengths = [one.get("completions/mean_length", 0.0) for one in self.logged(folder) if one["step"] <= steps]
        return sum(lengths) * batch

    def logged(self, folder: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]

    def learn(self, folder: Path, source: Path, model: Path | str, *overrides: str) -> Path:
        whole = ["eval_size=0", "eval_steps=null", "load_best_model_at_end=false", "save_steps=1000"]
        whole += [f"learning_rate={settings.STUDENT_RATE}", f"model_name_or_path={model}"]
        return without_checkpoints(self.stage("student_distill_tiny", folder, source, *whole, *overrides))

    def answered(self, model: Path | str, folder: Path) -> dict[str, Any]:
        """Figures of two answers to each question that no run has seen."""
        asked = [f"samples_per_question={settings.ANSWERS}", "pass_at=[1]", "questions_at_once=160"]
        asked += [f"max_completion_length={settings.ANSWER_TOKENS}", f"model_name_or_path={model}", *SHORT]
        source = self.out / "questions" / "evaluate.jsonl"
        place = self.stage("evaluate_tiny", folder / "evaluation", source, *asked)
        by_question = {row["question"]: row for row in rows.read(source)}
        answers = pandas.read_parquet(place / "answers.parquet").to_dict("records")
        accuracy = json.loads((place / EVALUATION).read_text(encoding="utf-8"))["accuracy"]
        of_task = {
            f"accuracy of {task}": finite_mean(a for q, a in accuracy.items() if by_question[q]["task"] == task)
            for task in sorted({row["task"] for row in by_question.values()})
        }
        ways = [measures.worked_of(by_question[row["question"]]) for row in answers]
        return {
            "accuracy": bootstrap(list(accuracy.values())).mean,
            **of_task,
            "right steps of answers": measures.right_steps([row["text"] for row in answers], ways),
            "tokens of answers": finite_mean(row["tokens"] for row in answers),
            "format rate of answers": measures.in_format(row["answer"] for row in answers),
        }

    def stage(self, run: str, folder: Path, source: Path | str, *overrides: str) -> Path:
        """A run in a process of its own, unless it is complete; a folder of other settings is refused."""
        source = self.questions / source if isinstance(source, str) else source
        place = [f"output_dir={folder}", f"seed={self.seed}", f"dataset_id_or_path={source}", "dataset_size=null"]
        place.append("report_to=null")
        its = Stage(str(folder), str(folder), [run, *place, *overrides])
        if not is_complete(configuration_of(its, [], devices=1)):
            run_child(["train.py", *its.arguments])
        return folder


def without_checkpoints(folder: Path) -> Path:
    """Gigabytes, and all that needed them is complete."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return folder
