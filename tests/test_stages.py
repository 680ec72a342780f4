"""From a teacher's traces to a student's evaluation, with real commands; kills in between change nothing."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import EMBEDDED, config_of, launch
from safetensors.torch import load_file

from rlt.data.sources import load_rows
from rlt.data.splits import questions_of
from rlt.jobs.collect import questions
from rlt.jobs.evaluate import check_apart, check_comparable, trained_on
from rlt.jobs.pipeline import Stage, check, check_evaluations, command_of, configuration_of, stages_of
from rlt.launching.lifetime import PREEMPTED
from rlt.planning.plan import Plan, make_plan
from rlt.planning.trl_fields import typed_settings
from rlt.prompts.rows import load_split_rows
from rlt.prompts.styles import FORMATS
from rlt.runs.folder import HELD_OUT, MARKER, check_output, prepare_output
from rlt.runs.learned import check_held_out, learned_questions, lineage, write_held_out, write_training_rows
from rlt.schema import DataConfig, pick
from rlt.traces.card import card
from rlt.traces.pairs import preference_pairs
from rlt.traces.selection import rank, select

FORMAT = {"name": "short", "explanation_tags": ["<explain>", "."]}  # any sentence ends an explanation


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "short.yaml"
    path.write_text(yaml.safe_dump(FORMAT))
    return str(path)


@pytest.fixture(scope="module")
def collection(style, tmp_path_factory):
    """(arguments but for the output folder, that of an undisturbed run)."""
    run = [
        *("collect_tiny", f"reasoning_format={style}", "dataset_size=7", "questions_at_once=2", "bf16=false"),
        "eval_size=1",
        *("traces_per_question=3", "keep_per_question=2", "max_completion_length=32"),
    ]
    folder = tmp_path_factory.mktemp("traces")
    done = launch("train.py", *run, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run, folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_traces_are_scored_ranked_filtered_and_counted(collection):
    _, folder = collection
    everything, kept = pandas.read_parquet(folder / "all/traces.parquet"), lines(folder / "traces.jsonl")
    assert len(everything) == 18
    for _, question in everything.groupby("question_id"):
        assert list(question["rank"]) == [1, 2, 3]
        assert list(question["reward"]) == sorted(question["reward"], reverse=True)
    assert 1 <= len(kept) <= 12
    table = pandas.read_parquet(folder / "traces.parquet")
    assert list(table["completion"]) == [row["completion"] for row in kept]
    assert list(table["reward"]) == [row["reward"] for row in kept]
    answer = kept[0]["messages"][2]["content"]
    assert kept[0]["reasoning_trace"] in answer and kept[0]["solution"] in answer
    card = (folder / "DATA_CARD.md").read_text()
    assert "| completions scored | 18 |" in card and f"| kept | {len(kept)} |" in card
    assert "| rows read | 7 |" in card and "| left out: held out | 1 |" in card and "| questions asked | 6 |" in card
    (held_out,) = load_rows(f"{folder}/{HELD_OUT}").rows
    assert held_out["question"] not in set(everything["question"]) and held_out["solution"]
    assert "| share of them in the format | " in card


@pytest.mark.slow
def test_a_collection_that_is_asked_to_stop_ends_its_part_and_goes_on(collection, tmp_path):
    run, undisturbed = collection
    stopped = launch("launch.py", "1", *run, f"output_dir={tmp_path}", RLT_SIGNAL_AT="collecting:2:SIGTERM")
    assert stopped.returncode == PREEMPTED, stopped.stderr[-3000:]
    assert len(list((tmp_path / "parts").glob("*.jsonl"))) == 2
    done = launch("launch.py", "1", *run, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "traces.jsonl").read_bytes() == (undisturbed / "traces.jsonl").read_bytes()


@pytest.mark.slow
def test_two_devices_collect_the_same_texts(collection, tmp_path):
    run, alone = collection
    done = launch("launch.py", "2", *run, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = lines(tmp_path / "traces.jsonl"), lines(alone / "traces.jsonl")
    assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):  # sums differ in their last bits with the number of threads
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)


def test_rewards_are_those_of_score_py(collection, style, tmp_path):
    """The log-probs a trace was sampled with stand for the teacher's own pass."""
    _, folder = collection
    rows = pandas.read_parquet(folder / "all/traces.parquet")
    source, target = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows[["question", "solution", "completion", "reward"]].rename(columns={"reward": "ours"}).to_json(
        source, orient="records", lines=True
    )
    models = [f"teacher_model={EMBEDDED}", f"student_model={EMBEDDED}", f"reasoning_format={style}"]
    done = launch("score.py", f"input={source}", f"output={target}", *models)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in lines(target):
        assert row["reward"] == pytest.approx(row["ours"], abs=2e-3)


def test_preferences_are_pairs_of_ranked_traces_and_train_a_teacher(collection, tiny_teacher, style, tmp_path):
    _, folder = collection
    ranked = pandas.read_parquet(folder / "all/traces.parquet")
    pairs = preference_pairs(folder, 0.1)
    for pair in pairs:
        rewards = ranked[ranked["question"] == pair["question"]].set_index("completion")["reward"]
        assert rewards[pair["chosen"]].max() == rewards.max() and rewards[pair["rejected"]].min() == rewards.min()
    with pytest.raises(ValueError, match="min_margin=1000"):
        preference_pairs(folder, 1000)
    run = ["dpo_tiny", f"model_name_or_path={tiny_teacher}", f"dataset_id_or_path={folder}", "min_margin=0.1"]
    small = ["train_batch_size=2", "per_device_train_batch_size=2", "max_steps=2", "bf16=false", "logging_steps=1"]
    done = launch("train.py", *run, *small, f"reasoning_format={style}", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [record["loss"] for record in lines(tmp_path / "metrics.jsonl") if "loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are one at the start
    assert losses[1] < losses[0]


def test_a_pair_keeps_the_system_prompt_that_its_traces_were_sampled_with(tmp_path):
    (tmp_path / "all").mkdir()
    shared = {"solution": "2", "matched": True}
    traces = [
        {
            **shared,
            "question_id": 0,
            "question": "a",
            "completion": "x",
            "reward": 1.0,
            "teacher_system_prompt": "Be brief.",
        },
        {
            **shared,
            "question_id": 0,
            "question": "a",
            "completion": "y",
            "reward": 0.0,
            "teacher_system_prompt": "Be brief.",
        },
        {**shared, "question_id": 1, "question": "b", "completion": "x", "reward": 1.0},
        {**shared, "question_id": 1, "question": "b", "completion": "y", "reward": 0.0},
    ]
    pandas.DataFrame(traces).to_parquet(tmp_path / "all" / "traces.parquet")
    own, default = preference_pairs(tmp_path, 0.5)
    assert own["teacher_system_prompt"] == "Be brief." and "teacher_system_prompt" not in default


def test_a_pair_is_the_best_trace_in_the_format_and_the_worst(tmp_path, caplog):
    (tmp_path / "all").mkdir()
    scored = [(0, "a", 3.0, False), (0, "b", 2.0, True), (0, "c", 0.0, False), (1, "d", 1.0, True), (1, "e", 0.9, True)]
    rows = [
        {
            "question_id": n,
            "question": str(n),
            "solution": "2",
            "completion": text,
            "reward": reward,
            "matched": matched,
        }
        for n, text, reward, matched in scored
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "all" / "traces.parquet")
    (pair,) = preference_pairs(tmp_path, 0.5)
    assert (pair["chosen"], pair["rejected"]) == ("b", "c")
    assert "1 rows left out: questions without traces that are min_margin=0.5 apart" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero3", "fsdp", "ddp"])
def test_the_best_checkpoint_is_kept_under_every_sharding(sharding, collection, tiny_student, style, tmp_path):
    _, traces = collection
    data = [f"dataset_id_or_path={traces}", f"model_name_or_path={tiny_student}", f"reasoning_format={style}"]
    # A learning rate at which the loss gets worse: the first checkpoint stays the best.
    steps = ["eval_size=2", "eval_steps=1", "save_steps=1", "max_steps=3", "learning_rate=1.0", "warmup_steps=0"]
    batch = ["train_batch_size=2", "per_device_train_batch_size=1", "bf16=false", "save_total_limit=null"]
    run = ["2", sharding, "student_distill_tiny", *data, *steps, *batch, f"output_dir={tmp_path}"]
    done = launch("launch.py", *run)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    final, best = (load_file(f / "model.safetensors") for f in (tmp_path, tmp_path / "checkpoint-1"))
    assert all(torch.equal(final[name], best[name]) for name in best)


@pytest.mark.slow
def test_a_student_that_is_asked_to_stop_goes_on_from_there_and_not_from_its_best(
    collection, tiny_student, style, tmp_path
):
    _, traces = collection
    data = [f"dataset_id_or_path={traces}", f"model_name_or_path={tiny_student}", f"reasoning_format={style}"]
    steps = ["eval_size=2", "eval_steps=1", "save_steps=1", "max_steps=60", "learning_rate=1.0", "warmup_steps=0"]
    batch = ["train_batch_size=2", "per_device_train_batch_size=1", "bf16=false", "save_total_limit=1"]
    run = ["1", "student_distill_tiny", *data, *steps, *batch, f"output_dir={tmp_path}"]
    stopped = launch("launch.py", *run, RLT_SIGNAL_AT="saving:2:SIGTERM")
    assert stopped.returncode == PREEMPTED, stopped.stderr[-3000:]
    best, last = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert best == 1 and f"after step {last} and saved" in stopped.stderr


@pytest.mark.slow
def test_a_students_answers_are_counted_while_it_learns_and_choose_the_checkpoint(tiny_student, style, tmp_path):
    source = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {n}?", "solution": "4", "reasoning_trace": "Two and two."} for n in range(18)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"dataset_id_or_path={source}", f"model_name_or_path={tiny_student}", f"reasoning_format={style}"]
    steps = [
        "eval_size=2",
        "eval_steps=30",
        "save_steps=30",
        "max_steps=60",
        "learning_rate=1e-2",
        "save_total_limit=null",
    ]
    asked = ["eval_answers=2", "temperature=0.1", "max_completion_length=48", "metric_for_best_model=eval_accuracy"]
    steps += ["bf16=false"]
    folder = tmp_path / "run"
    done = launch("train.py", "student_distill_tiny", *data, *steps, *asked, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = [record["eval_accuracy"] for record in lines(folder / "metrics.jsonl") if "eval_accuracy" in record]
    assert accuracy[-1] == 1.0  # there is but one answer to learn
    state = json.loads((folder / "checkpoint-60" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(accuracy)


def as_override(stage: dict) -> str:
    settings = ",".join(f"{key}:'{value}'" for key, value in stage["set"].items())
    return f"{{name:{stage['name']},run:{stage['run']},set:{{{settings}}}}}"


def test_a_pipeline_trains_evaluates_reports_and_skips_what_is_done(collection, tiny_student, style, tmp_path):
    _, traces = collection
    tiny = [f"model_name_or_path={tiny_student}", f"reasoning_format={style}", "bf16=false"]
    student = dict(word.split("=", 1) for word in tiny) | {
        "dataset_id_or_path": str(traces),
        "eval_size": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "train_batch_size": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    questions = {
        "dataset_size": 4,
        "samples_per_question": 2,
        "pass_at": "[1,2]",
        "max_completion_length": 8,
        "bf16": "false",
        "reasoning_format": style,
    }
    stages = [
        {"name": "student", "run": "student_distill_tiny", "set": student},
        {"name": "before", "run": "evaluate_tiny", "set": {**questions, "model_name_or_path": tiny_student}},
        {
            "name": "after",
            "run": "evaluate_tiny",
            "set": {**questions, "model_name_or_path": "{student}", "compare_with": "{before}"},
        },
    ]
    text = ",".join(map(as_override, stages))
    run = ["pipeline_tiny", f"stages=[{text}]", f"output_dir={tmp_path / 'pipeline'}"]
    done = launch("train.py", *run)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "pipeline"
    result = json.loads((folder / "after" / "evaluation.json").read_text())
    assert result["questions"] == 4 and set(result["difference"]) == {"mean", "low", "high"}
    assert {"average@2", "pass@1", "pass@2"} <= set(result["figures"])
    state = json.loads(next((folder / "student").glob("checkpoint-4/trainer_state.json")).read_text())
    assert state["best_model_checkpoint"] == str(folder / "student" / f"checkpoint-{state['best_global_step']}")
    held_out = questions_of(lines(folder / "student" / HELD_OUT))
    assert held_out and held_out < questions_of(load_rows(str(traces)).rows)
    page = (folder / "report.html").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    for wanted in ("data:image/png;base64", "<h2>student</h2>", "difference, paired"):
        assert wanted in page
    for outside in ("http://", "https://", "<script src"):
        assert outside not in page
    again = launch("train.py", *run)
    assert again.returncode == 0 and "is complete" in again.stdout


@pytest.mark.parametrize(
    ("profile", "logged"),
    [
        (
            "grpo_verifier",
            ("rewards/answer_reward/mean", "rewards/format_reward/mean", "verifier/failures", "eval/answer_reward"),
        ),
        pytest.param(
            "teacher_grpo_verifier",
            ("rewards/teacher_reward/mean", "rewards/length_penalty/mean", "eval/length"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_verifiable_rewards_train_alone_and_with_a_teachers(profile, logged, tiny_run, tmp_path):
    only_teachers = ("student_model",)
    run = [word for word in tiny_run if profile.startswith("teacher") or not word.startswith(only_teachers)]
    run[0] = "run_cfg=grpo_verifier_tiny" if profile == "grpo_verifier" else f"trainer_cfg={profile}"
    done = launch("train.py", *run, "max_steps=1", "save_steps=100", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = {key for record in lines(tmp_path / "metrics.jsonl") for key in record}
    assert set(logged) <= found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("collect_tiny", "keep_per_question=5"), "keep_per_question=5 must be in 1 to traces_per_question=4"),
        (("collect_tiny", "student_model=null"), "student_model=null"),
        (("evaluate_tiny", "pass_at=[8]"), "8 is not in 1 to samples_per_question=4"),
        (("evaluate_tiny", "temperature=0"), "all are the same"),
        (("evaluate_tiny", "dataset_id_or_path=benchmark/aime99"), "use one of aime24, math500, gpqa_diamond"),
        (("pipeline_tiny", "stages=[{name:a,run:collect_tiny,set:{model_name_or_path:'{b}'}}]"), "names 'b'"),
        (
            (
                "pipeline_tiny",
                "stages=[{name:a,run:teacher_sft_tiny,set:{use_peft:true}},"  # whose checkpoints are small
                "{name:b,run:evaluate_tiny,set:{dataset_seed:1}}]",
            ),
            "stage b: dataset_id_or_path=reasoning_gym/gsm_symbolic against reasoning_gym/gsm_symbolic: 100 evaluation",
        ),
        (("student_distill_tiny", "dataset_id_or_path=nowhere/at/all"), "does not exist"),
        (("student_distill_tiny", "eval_size=0"), "load_best_model_at_end=true needs eval_size"),
        (("student_sft_tiny", "eval_answers=2"), "eval_answers=2 needs eval_size and eval_steps"),
        (("pipeline_tiny", "model_name_or_path=x"), "'model_name_or_path' is not a key of a pipeline run"),
        (("dpo_tiny", "eval_size=8"), "eval_size=8: preference training holds no traces out"),
        (("student_distill_tiny", "eval_steps=5"), "save_steps=10 must be eval_steps=5"),
        (("student_distill_tiny", "metric_for_best_model=eval_accuracy"), "with eval_answers there are more"),
        (("student_sft_tiny", "eval_size=4"), "eval_size=4: rows are held out and never looked at; set eval_steps"),
        (("evaluate_tiny", "eval_size=4"), "eval_size=4: an evaluation asks all rows"),
        (("student_distill_tiny", "eval_answers=1", "verifier=maths"), "verifier=maths: use one of"),
        (
            ("grpo_verifier_tiny", "answer_weight=0", "format_weight=0", "length_weight=0"),
            "answer_weight, format_weight and length_weight are all 0",
        ),
        (("dpo_tiny", "load_best_model_at_end=true"), "a dpo run ends with its last weights"),
        (("grpo_verifier_tiny", "load_best_model_at_end=true"), "needs eval_size and eval_steps"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path):
    done = launch("train.py", *arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.strip().count("\n") == 0


def made_by(folder: Path, **settings) -> str:
    """A model's folder that says which run made it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**config_of("student_sft_tiny"), **settings}))
    return str(folder)


def test_what_a_model_has_learned_from_goes_back_to_where_it_started(tmp_path):
    first = made_by(tmp_path / "first", dataset_id_or_path="reasoning_gym/gcd")
    second = made_by(tmp_path / "second", trainer="dpo", dataset_id_or_path="traces", model_name_or_path=first)
    assert [(its["dataset_id_or_path"], its["dataset_size"]) for its in lineage(Path(second) / "checkpoint-2")] == [
        ("traces/all/traces.parquet", None),  # a dpo run counts pairs, not rows
        ("reasoning_gym/gcd", 64),
    ]


def test_a_model_of_another_program_is_known_to_have_learned_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 3}")
    assert list(lineage(tmp_path)) == []


def test_a_run_that_goes_on_holds_out_what_it_held_out_before(tmp_path):
    rows = [{"question": "1 + 1?"}, {"question": "1 + 2?"}]
    check_held_out(tmp_path, rows)
    write_held_out(tmp_path, rows)
    check_held_out(tmp_path, rows[::-1])
    with pytest.raises(ValueError, match="the held-out questions are others than when this run began"):
        check_held_out(tmp_path, [rows[0], {"question": "1 + 3?"}])


def test_a_stage_may_ask_what_an_earlier_one_will_have_held_out():
    asked = "dataset_id_or_path:'{a}/held_out.jsonl',model_name_or_path:'{a}'"
    stages = f"stages=[{{name:a,run:grpo_verifier_tiny}},{{name:b,run:evaluate_tiny,set:{{{asked}}}}}]"
    made = stages_of(config_of("pipeline_tiny", stages, "output_dir=results/p"))
    check_evaluations([(stage, config_of(*stage.arguments)) for stage in made])


def test_every_stage_gets_the_pipelines_seed_unless_it_has_its_own(tmp_path):
    stages = "stages=[{name:a,run:collect_tiny},{name:b,run:evaluate_tiny,set:{seed:7}}]"
    first, second = stages_of(config_of("pipeline_tiny", "seed=3", stages))
    assert config_of(*first.arguments)["seed"] == 3 and config_of(*second.arguments)["seed"] == 7


def test_a_pipelines_folder_may_have_any_name():
    stages = "stages=[{name:a,run:student_sft_tiny},{name:b,run:evaluate_tiny,set:{model_name_or_path:'{a}/merged'}}]"
    made = stages_of(config_of("pipeline_tiny", stages, "output_dir='results/it\\'s/seed=1,2'"))
    first, second = (config_of(*stage.arguments) for stage in made)
    assert first["output_dir"] == "results/it's/seed=1,2/a"
    assert second["model_name_or_path"] == "results/it's/seed=1,2/a/merged"


def test_only_stages_that_train_are_sharded(tmp_path):
    collection = Stage("traces", str(tmp_path / "a"), ["collect_tiny", f"output_dir={tmp_path / 'a'}"])
    student = Stage(
        "student",
        str(tmp_path / "b"),
        ["student_sft_tiny", f"output_dir={tmp_path / 'b'}", "use_peft=true", "save_merged_model=true"],
    )
    pipeline = Plan({}, 2, 0, 0, 0, sharding="zero2")
    assert command_of(configuration_of(collection, [], 2, "zero3"), pipeline) == ["launch.py", "2"]
    config = configuration_of(student, [], 2, "zero2")
    assert command_of(config, pipeline) == ["launch.py", "2", "zero2"]
    assert command_of(config, replace(pipeline, sharding=None)) == ["train.py"]
    with pytest.raises(ValueError, match="stage student: save_merged_model=true with zero3"):
        configuration_of(student, [], 2, "zero3")


def test_a_stage_that_warms_up_first_can_be_continued(tmp_path):
    stage = Stage("rl", str(tmp_path), ["grpo_verifier_tiny", f"output_dir={tmp_path}", "use_peft=true"])
    config = configuration_of(stage, [], 1)
    assert config["model_name_or_path"] == "results/student_sft_tiny"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    configuration_of(stage, [], 1)


def test_what_is_made_of_samples_may_change_until_a_run_is_complete(tmp_path):
    config = config_of("collect_tiny", f"output_dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    changed = {**config, "min_format_rate": 0.5}
    check_output(changed)
    (tmp_path / MARKER).touch()
    with pytest.raises(ValueError, match="holds a different run .min_format_rate"):
        check_output(changed)


def test_the_stages_of_an_unfinished_pipeline_may_change_and_finished_ones_may_not(tmp_path):
    def pipeline(*stages: str) -> Plan:
        named = f"stages=[{','.join(stages)}]"
        return make_plan(config_of("pipeline_tiny", named, f"output_dir={tmp_path / 'p'}"), list_missing=False)

    def stage(name: str, steps: int = 2, rate: str = "1e-5") -> str:
        return f"{{name:{name},run:student_sft_tiny,set:{{max_steps:{steps},learning_rate:{rate}}}}}"

    first = pipeline(stage("a"), stage("b"))
    prepare_output(first.config)
    prepare_output(check(first)[0][1])
    (tmp_path / "p" / "a" / MARKER).write_text('{"steps": 2, "epochs": 1.0}')
    assert [s.name for s, _ in check(pipeline(stage("a"), stage("b", rate="2e-5"), stage("c")))] == ["a", "b", "c"]
    changed = pipeline(stage("a", rate="2e-5"), stage("b"))
    with pytest.raises(ValueError, match="stage a: output_dir=.* holds a different run .learning_rate: 1e-05 there"):
        check(changed)
    (tmp_path / "p" / MARKER).write_text('{"stages": ["a", "b"]}')
    with pytest.raises(ValueError, match="holds a different run .stages"):
        pipeline(stage("a"), stage("c"))


def test_a_source_that_is_named_must_be_there_and_one_that_is_remembered_need_not(tmp_path, caplog):
    gone = {**config_of("student_sft_tiny"), "dataset_id_or_path": str(tmp_path / "gone.jsonl")}
    evaluation = config_of("evaluate_tiny")
    check_apart(evaluation, [], [gone])
    assert "not checked against" in caplog.text
    with pytest.raises(ValueError, match="does not exist"):
        check_apart(evaluation, [], [gone], must_be_there=True)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("reasoning_gym/gcd", "which questions were drawn is in a run's"),
        ("FOLDER", "is a pipeline: name one of its stages"),
    ],
)
def test_what_does_not_say_which_rows_were_learned_is_refused(named, says, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of("pipeline_tiny")))
    with pytest.raises(ValueError, match=says):
        trained_on(config_of("evaluate_tiny", f"trained_on={named.replace('FOLDER', str(tmp_path))}"))


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of("evaluate_tiny")))
    done = launch("report.py", str(tmp_path), f"--out={tmp_path / 'nowhere' / 'report.html'}")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_rows_that_training_held_out_may_be_asked(tmp_path):
    learned = config_of("grpo_verifier_tiny", "dataset_size=20", "eval_size=5", f"output_dir={tmp_path}")
    kept, held_out, _ = load_split_rows(pick(learned, DataConfig), FORMATS["stratos"])  # as a run splits them
    check_apart(learned, held_out, [learned])
    with pytest.raises(ValueError, match="1 evaluation rows are among the training rows"):
        check_apart(learned, [*held_out, kept[0]], [learned])


def test_what_a_model_learned_is_its_runs_sources_without_what_they_held_out(tmp_path, caplog):
    source = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n} + 1?", "solution": str(n + 1)} for n in range(4)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    warmed = made_by(tmp_path / "warmed", dataset_id_or_path=str(source), eval_size=0)
    gone = made_by(tmp_path / "gone", dataset_id_or_path=str(tmp_path / "gone.jsonl"), model_name_or_path=warmed)
    assert learned_questions(gone) == questions_of(rows)
    assert "what" in caplog.text and "was trained on is not known" in caplog.text
    write_held_out(Path(warmed), rows[1:3])
    assert learned_questions(warmed) == questions_of([rows[0], rows[3]])
    assert questions_of(load_rows(f"{warmed}/{HELD_OUT}").rows) == questions_of(rows[1:3])


def test_what_a_run_was_trained_on_is_not_known_once_its_source_has_other_rows(tmp_path, caplog):
    source = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n} + 1?", "solution": str(n + 1)} for n in range(4)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = made_by(tmp_path / "model", dataset_id_or_path=str(source), eval_size=0, model_name_or_path="a/model")
    write_training_rows(Path(model), load_rows(str(source)).rows)
    assert learned_questions(model) == questions_of(rows)
    assert not caplog.text
    source.write_text('{"question": "2 * 3?", "solution": "6"}\n')
    assert learned_questions(model) == set()
    assert f"{source} has other rows now than {model} was trained on" in caplog.text
    evaluation = config_of("evaluate_tiny", f"trained_on={model}")
    with pytest.raises(ValueError, match="has other rows now"):
        check_apart(evaluation, [], trained_on(evaluation), must_be_there=True)


def test_an_earlier_run_whose_folder_is_gone_is_said(tmp_path, caplog):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "solution": "2"}) + "\n")
    settings = {"dataset_id_or_path": str(source), "eval_size": 0}
    first = made_by(tmp_path / "first", **settings, model_name_or_path="Qwen/Qwen2.5-7B-Instruct")
    second = made_by(tmp_path / "second", **settings, model_name_or_path=first)
    assert [config["output_dir"] for config in lineage(Path(second))] == [second, first]
    assert not caplog.text  # a model of the hub was made by no run here
    shutil.rmtree(first)
    assert [config["output_dir"] for config in lineage(Path(second))] == [second]
    assert f"{second} was made from {first}, which is gone: what that was trained on is not known" in caplog.text


def test_no_held_out_sum_of_the_verifiers_run_was_learned_in_its_warm_up(tmp_path):
    learned = learned_questions(made_by(tmp_path / "warmed"))
    rows = pick(config_of("grpo_verifier_tiny"), DataConfig)
    assert len(learned & questions_of(load_split_rows(rows, FORMATS["stratos"])[1])) == 2  # 64 sums of 4,000
    _, held_out, _ = load_split_rows(rows, FORMATS["stratos"], learned)
    assert len(held_out) == 96 and not learned & questions_of(held_out)


def test_questions_that_were_trained_on_are_refused(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "solution": "2"}) + "\n")
    run = ["evaluate_tiny", f"dataset_id_or_path={source}", f"trained_on={source}", f"output_dir={tmp_path / 'run'}"]
    done = launch("train.py", *run)
    assert done.returncode == 1
    assert "1 evaluation rows are among the training rows, the first: '1 + 1?'" in done.stderr


def evaluation_like(config: dict, folder: Path, **settings) -> dict:
    """The configuration, to be compared with an evaluation of other settings."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    return {**config, "compare_with": str(folder)}


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [
        ("max_completion_length", 64, 256),
        ("temperature", 1.0, 0.7),
        ("top_p", 0.5, 1.0),
        ("answer_line", True, False),
        ("reasoning_format", "r1", "stratos"),
        ("verifier", "exact", "auto"),
    ],
)
def test_evaluations_that_asked_or_judged_otherwise_are_not_compared(key, there, here, tmp_path):
    config = evaluation_like(config_of("evaluate_tiny"), tmp_path, **{key: there})
    with pytest.raises(ValueError, match=f"compare_with={tmp_path}: {key} is {there} there and {here} here"):
        check_comparable(config)


def test_evaluations_that_differ_in_model_and_samples_alone_are_compared(tmp_path):
    other = {"model_name_or_path": "another", "samples_per_question": 2, "dataset_size": 5}
    check_comparable(evaluation_like(config_of("evaluate_tiny"), tmp_path, **other))
    check_comparable(config_of("evaluate_tiny"))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="holds no config.yaml"):
        check_comparable(config_of("evaluate_tiny", f"compare_with={tmp_path}"))


@pytest.mark.parametrize("run", ["pipeline", "pipeline_tiny"])
def test_a_shipped_pipeline_compares_what_can_be_compared(run, tmp_path):
    before, after = (config_of(*stage.arguments) for stage in stages_of(config_of(run))[-2:])
    assert after["compare_with"] == before["output_dir"]
    check_comparable({**after, "compare_with": evaluation_like(before, tmp_path)["compare_with"]})


def test_the_card_counts_every_row_that_was_read(tokenizer, tmp_path):
    source = tmp_path / "rows.jsonl"
    texts = ["", "1 + 1?", "1 + 1?", "  ", "1 + 2?", "1 + 3?", "word " * 600, "1 +  4?"]
    source.write_text("".join(json.dumps({"question": text, "solution": "2"}) + "\n" for text in texts))
    config = config_of("collect_tiny", f"dataset_id_or_path={source}", "eval_size=1", "dataset_size=null")
    config["dataset_seed"] = 3  # holds out the question that comes twice
    settings = typed_settings(config)
    asked, held_out = questions(settings, tokenizer, FORMATS["stratos"])
    assert [row["question"] for row in held_out] == ["1 + 1?"]
    row = {"reasoning_trace": "t", "matched": True, "student_tokens": 1, "tokens": 1}
    row |= dict.fromkeys(("reward", "solution_log_prob_reward", "kl_reward"), 0.0)
    scored = [{**row, "question": its["question"]} for its in asked.rows]
    text = card(config, asked, select(rank(scored), settings))
    counted = [line for line in text.splitlines() if line.startswith(("| rows read", "| left out", "| questions"))]
    assert counted == [
        "| rows read | 8 |",
        "| left out: empty question | 2 |",
        "| left out: held out | 1 |",
        "| left out: repeats an evaluation question | 1 |",
        "| left out: prompt longer than max_prompt_length=512 | 1 |",
        "| questions asked | 3 |",
    ]
