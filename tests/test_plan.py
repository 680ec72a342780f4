"""What is refused before anything heavy is loaded, and that every configuration composes."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, config_of, launch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_reductions import PAPER

from rlt.commands.begin import show
from rlt.commands.torchrun import forget_place
from rlt.commands.train import check_sweep
from rlt.jobs.pipeline import stages_of
from rlt.planning import reward_checks
from rlt.planning.checks import known_keys
from rlt.planning.configuration import GROUPS, as_value, options, quoted, rewrite_arguments
from rlt.planning.plan import make_plan
from rlt.planning.ranges import RANGES
from rlt.planning.resolve import with_warmup
from rlt.planning.trl_fields import TABLE, read_table
from rlt.prompts.styles import load_format
from rlt.rewards import reductions, verifiers
from rlt.rewards.verified import verified_rewards
from rlt.runs.folder import prepare_output
from rlt.runs.hidden import hide_secrets
from rlt.schema import PROFILES, VerifiedRewardConfig
from trainers.field_table import build_table

EMBEDDED = "model_name_or_path=embedded/smollm2-135m-instruct"
HUB_OFF = {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("run", options("run_cfg"))
def test_every_run_is_planned_without_gpu_network_or_warm_up(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = make_plan(config_of(run, "dry_run=true"))
    expected = {"collect": "questions x answers", "evaluate": "questions x answers", "pipeline": ". collect: collect"}
    expected["prepare"] = "engine "
    assert expected.get(plan.config["trainer"], "rows per step") in plan.report()


OPTIONS = [  # those of memory_cfg are laid over a run, in test_memory.py
    (group, option)
    for group in GROUPS
    for option in options(group)
    if group not in ("run_cfg", "memory_cfg", "preparation")
    and not (group == "trainer_cfg" and "teacher" not in option)
]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_is_planned_in_the_default_run(group, option, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_plan(config_of(f"{group}={option}", "dry_run=true"))


@pytest.mark.parametrize("option", options("preparation"))
def test_every_preparation_is_planned(option, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "solution": "2"}')
    plan = make_plan(config_of("run_cfg=prepare_tiny", f"preparation={option}", f"sources=[{tmp_path}/rows.jsonl]"))
    assert "rows.jsonl" in plan.report()


@pytest.mark.parametrize("profile", ["grpo", "grpo_mono"])
def test_a_plain_grpo_run_is_planned(profile, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the sft profile is teacher_sft_tiny's
    plan = make_plan(config_of("run_cfg=grpo_exact", f"trainer_cfg={profile}", "dry_run=true"))
    assert plan.config["reward_functions"] == ["rlt.rewards.exact.exact_answer"]


def test_the_table_of_trainer_fields_is_that_of_the_installed_trl():
    assert read_table() == build_table(), f"run python -m trainers.field_table to renew {TABLE.name}"


def test_the_paper_run_has_the_papers_values():
    config = config_of("teacher_rlt")
    assert {
        k: config[k] for k in ("train_batch_size", "num_generations", "max_steps", "learning_rate", "temperature")
    } == {
        "train_batch_size": 1024,
        "num_generations": 64,
        "max_steps": 125,
        "learning_rate": 1e-6,
        "temperature": 0.7,
    }
    assert (config["ref_model_sync_steps"], config["ref_model_mixup_alpha"], config["sync_ref_model"]) == (
        32,
        0.9,
        True,
    )
    assert config["max_prompt_length"] + config["max_completion_length"] == 16384  # the paper's context
    assert config["eval_steps"] == 4
    assert (config["answer_log_prob_coeff"], config["kl_penalty_reward_coeff"]) == ([1, 0.01], [3, 0.03])


BAD = [
    (["num_generations=5"], "use one of [2, 4, 8, 16, 32]"),
    (["per_device_train_batch_size=5"], "use one of [1, 2, 4, 8, 16, 32]"),
    (["learning_rate=fast"], "it must be float"),
    (["max_steps=2.5"], "it must be int"),
    (["use_vllm=3"], "it must be bool"),
    (["gradient_accumulation_steps=2"], "set train_batch_size instead"),
    (["vllm_max_model_length=64"], "set max_prompt_length and max_completion_length instead"),
    (["save_strategy=no"], "save_strategy: runs here need it as it is"),
    (["max_length=10"], "not a key of a teacher_grpo run"),
    (["temperature=0"], "temperature above 0"),
    (["max_completion_length=8000"], "may be up to 7680"),
    (["run_cfg=collect_tiny", "max_student_length=9000"], "longer than the context of 8192"),
    (["logprob_token_budget=703"], "the smallest that works is 704"),
    (["use_peft=true", "sync_ref_model=true"], "sync_ref_model=true with use_peft=true"),
    (["load_in_4bit=true"], "set use_peft=true"),
    (["beta=0", "student_model=null"], "name a student"),
    (["reduction_kl_fn=[mean,maximum]"], "'maximum' is not a reduction"),
    (["kl_penalty_reward_coeff=[1]"], "of one length"),
    (["normalize_kl_fn=log"], "none, exp, exp_norm"),
    (["dataset_id_or_path=missing.jsonl"], "missing.jsonl does not exist in /"),
    (["dataset_id_or_path=reasoning_gym/gsm_symbolik"], "did you mean gsm_symbolic"),
    (["dataset_id_or_path=results/no_such_collection"], "results/no_such_collection does not exist"),
    (["model_name_or_path=./nowhere"], "model path does not exist in /"),
    (["model_name_or_path=some/model"], "hub"),
    (["student_model=embedded/other"], "is not embedded"),
    (["reasoning_format=xml"], "['r1', 'stratos']"),
    (["resume_from=nowhere"], "not a checkpoint folder"),
    (["eval_dataset_id_or_path=reasoning_gym/gsm_symbolic"], "among the training rows"),
    (["generation_aggregation_steps=3"], "generation_aggregation_steps=3"),
    (["eval_size=16", "dataset_size=16"], "eval_size=16 leaves nothing of dataset_size=16 rows"),
    (["lr_scheduler_type=cosin"], "lr_scheduler_type=cosin does not exist: use cosine"),
    (["optim=foo"], "optim=foo does not exist"),
    (["answer_line=true"], "a teacher explains a solution"),
    (["save_only_model=true"], "runs here need it as it is"),
    (["cast_lm_head_to_fp32=true"], "runs here need it as it is"),
    (["eval_steps=0.2"], "must be a whole number of steps"),
    (["model_init_kwargs={}"], "runs here need it as it is"),
    (["resume_from_checkpoint=x"], "set resume_from instead"),
    (["run_cfg=teacher_sft_tiny", "packing=true"], "runs here need it as it is"),
    (["run_cfg=collect_tiny", "use_peft=true"], "use_peft is for runs that train"),
    (["verifier=math"], "verifier is a verifier's: set trainer_cfg=grpo_verifier"),
    (["format_weight=0.5"], "format_weight is a verifier's"),
    (["reward_functions=[no.such]"], "'no.such' is not a dotted path"),
    (["max_steps=-5"], "max_steps=-5: use -1 for num_train_epochs, or a number above 0"),
    (["reward_weights=[1.0,2.0]"], "reward_weights=[1.0, 2.0] must be 1 number, for teacher_reward"),
    (
        ["run_cfg=grpo_verifier_tiny", "format_weight=0.5", "length_weight=0", "reward_weights=[1.0]"],
        "reward_weights=[1.0] must be 2 numbers, for answer_reward, format_reward",
    ),
    (
        ["run_cfg=grpo_exact", "reward_weights=[x]"],
        "reward_weights=['x'] must be 1 number, for exact_answer",
    ),
    (["ref_model_sync_steps=0"], "ref_model_sync_steps=0 must be at least 1"),
    (["logging_steps=0"], "logging_steps=0 must be above 0"),
    (["beta=-0.1"], "beta=-0.1 must be 0 or more"),
    (["top_p=0"], "top_p=0 must be above 0 and at most 1"),
    (["vllm_gpu_memory_utilization=1.5"], "vllm_gpu_memory_utilization=1.5 must be above 0 and at most 1"),
    (["adam_beta2=1.0"], "adam_beta2=1.0 must be 0 or more and below 1"),
    (["ref_model_mixup_alpha=-1"], "ref_model_mixup_alpha=-1 must be in 0 to 1"),
    (["top_p=0.9"], "top_p=0.9: the engine's log-probs would be those of a cut distribution"),
    (["top_k=20"], "top_k=20: the engine's"),
    (["min_p=0.1"], "min_p=0.1: the engine's"),
    (["repetition_penalty=1.2"], "repetition_penalty=1.2: the engine's"),
    (["generation_kwargs={top_p: 0.9}"], "top_p=0.9: the engine's"),
    (["generation_kwargs={presence_penalty: 0.5}"], "presence_penalty=0.5: the engine's"),
    (["generation_kwargs={frequency_penalty: -0.5}"], "frequency_penalty=-0.5: the engine's"),
    (["generation_kwargs={min_tokens: 8}"], "min_tokens=8: the engine's"),
    (["generation_kwargs={logit_bias: {5: 1.0}}"], "logit_bias={5: 1.0}: the engine's"),
    (["generation_kwargs={bad_words: [x]}"], "bad_words=['x']: the engine's"),
    (["generation_kwargs={allowed_token_ids: [1, 2]}"], "allowed_token_ids=[1, 2]: the engine's"),
    (["generation_kwargs={structured_outputs: {choice: [x]}}"], "structured_outputs={'choice': ['x']}: the engine's"),
    (["generation_kwargs={logits_processors: [x.y]}"], "logits_processors=['x.y']: the engine's"),
    (["generation_kwargs={extra_args: {x: 1}}"], "extra_args={'x': 1}: the engine's"),
    (["generation_kwargs={thinking_token_budget: 8}"], "thinking_token_budget=8: the engine's"),
    (["generation_kwargs={temperature: 0.3}"], "temperature=0.3 is not the temperature="),
    (["generation_kwargs='{\"top_k\": 5}'"], "top_k=5: the engine's"),
    (["generation_kwargs=top_k"], "generation_kwargs=top_k is not JSON"),
    (["cache_implementation=static"], "cache_implementation=static is Hugging Face's"),
    (
        ["loss_type=vespo", "vllm_importance_sampling_mode=sequence_mask"],
        "vllm_importance_sampling_mode=sequence_mask: it weighs completions itself",
    ),
    (["torch_compile=true"], "torch_compile: runs here need it as it is"),
    (["vllm_group_port=1"], "vllm_group_port: runs here need it as it is"),
    (["use_liger_kernel=true"], "pip install liger-kernel"),
    (["full_determinism=true"], "set deterministic instead"),
    (["top_k=-2"], "top_k=-2 must be -1 or 0 for all tokens, or at least 1"),
    (["run_cfg=evaluate_tiny", "questions_at_once=0"], "questions_at_once=0 must be positive"),
]


@pytest.mark.parametrize(("overrides", "says"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_bad_input_is_refused_in_one_line(overrides, says, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = [] if any("model_name" in o for o in overrides) else [EMBEDDED]
    with pytest.raises(ValueError) as refused:
        make_plan(config_of(*named, f"output_dir={tmp_path / 'run'}", *overrides))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_leaves_a_distribution_whole_or_is_not_corrected_is_planned(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = "{presence_penalty: 0.0, min_tokens: 0, logit_bias: {}, bad_words: [], stop: [x], temperature: 0.7}"
    cut = ["generation_kwargs={min_tokens: 8}", "vllm_importance_sampling_correction=false"]
    for place, overrides in (("whole", [f"generation_kwargs={whole}", "temperature=0.7"]), ("cut", cut)):
        make_plan(config_of(EMBEDDED, f"output_dir={tmp_path / place}", *overrides))


def test_a_path_in_the_home_folder_is_read_as_a_shell_reads_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of("output_dir='~/runs/q'", "dataset_id_or_path='~/rows.jsonl'", "results_dir='~/r'")
    assert [config[key] for key in ("output_dir", "dataset_id_or_path", "results_dir")] == [
        f"{tmp_path}/runs/q",
        f"{tmp_path}/rows.jsonl",
        f"{tmp_path}/r",
    ]
    assert config_of("results_dir='~/r'")["output_dir"] == f"{tmp_path}/r/teacher_rlt_tiny"


@pytest.mark.parametrize("content", [b"max_steps: 3\n", b"\xef\xbb\xbf# @package _global_\nmax_steps: 3\n"])
def test_a_run_file_without_its_head_is_one_line(content, monkeypatch, tmp_path):
    monkeypatch.setattr("rlt.planning.configuration.CFGS", tmp_path)
    (tmp_path / "run_cfg").mkdir()
    (tmp_path / "run_cfg" / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="cfgs/run_cfg/mine.yaml must begin with the line `# @package _global_`"):
        rewrite_arguments(["mine"])


def test_half_precision_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16=true needs a GPU"):
        make_plan(config_of(EMBEDDED, "fp16=true", "bf16=false"))


@pytest.mark.parametrize("place", [["WORLD_SIZE", "RANK"], ["PMI_SIZE"], ["OMPI_COMM_WORLD_SIZE"]])
def test_places_that_a_controller_left_are_forgotten_by_a_run_of_one_process(place, monkeypatch):
    for name in place:
        monkeypatch.setenv(name, "2")
    forget_place()
    assert not set(place) & os.environ.keys()


def test_a_run_of_one_process_forgets_the_place_that_a_controller_left(tmp_path):
    keys = ["teacher_rlt_tiny", "dry_run=true", f"output_dir={tmp_path}"]
    done = launch("train.py", *keys, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WORLD_SIZE=2 in the environment is ignored: this is a run of one process" in done.stderr


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "teacher_rlt", "teacher_rlt_mono", "grpo_exact"])
def test_importance_ratios_are_those_of_tokens(run):
    assert config_of(f"run_cfg={run}")["vllm_importance_sampling_mode"] == "token_truncate"


@pytest.mark.parametrize(("processes", "lines"), [("1", 0), ("8", 1)])
def test_a_forgotten_place_is_said_where_it_named_others(processes, lines, monkeypatch, caplog):
    """vLLM and accelerate leave LOCAL_WORLD_SIZE=1 in the environment of what they start."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    with caplog.at_level(logging.INFO, logger="rlt"):
        forget_place()
    assert "LOCAL_WORLD_SIZE" not in os.environ
    assert len([record for record in caplog.records if "is ignored" in record.message]) == lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_run"], "teacher_rlt_tiny"),
        (["num_generation=4"], "did you mean num_generations"),
        (["seed=[1"], "cannot be read"),
        (["hub_token=hf_x", "seed=1,2", "-m"], "overrides are written to disk"),
    ],
)
def test_the_command_line_is_read_before_hydra_is(arguments, says):
    with pytest.raises(ValueError, match=says):
        check_sweep(rewrite_arguments(arguments))


def test_several_values_are_refused_where_nothing_sweeps():
    with pytest.raises(ValueError, match=r"kl_penalty_reward_coeff=3,0.03 names several values: a list is \[3,0.03\]"):
        config_of("kl_penalty_reward_coeff=3,0.03")


@pytest.mark.parametrize("name", ["teacher_sft_tiny", "teacher_sft_tiny.yaml", "cfgs/run_cfg/teacher_sft_tiny.yaml"])
def test_a_run_is_named_bare_with_suffix_or_by_path(name):
    assert rewrite_arguments([name]) == ["run_cfg=teacher_sft_tiny"]


def test_every_key_with_a_range_is_a_number_that_some_run_has():
    known = [kinds for trainer in PROFILES for kinds in [known_keys(trainer)]]
    for key in [key for keys, *_ in RANGES for key in keys]:
        assert any({"int", "float"} & set(kinds.get(key, ())) for kinds in known), key


def test_the_names_that_the_plan_admits_are_those_that_the_rewards_have():
    assert set(reward_checks.REDUCTIONS) == reductions.reductions_of(PAPER).keys()
    assert set(reward_checks.NORMALIZERS) == reductions.NORMALIZERS.keys()
    assert set(reward_checks.VERIFIERS) == {"auto", *verifiers.CHECKS}
    every = dict.fromkeys(reward_checks.VERIFIED.values(), 0.5)
    config = VerifiedRewardConfig(**every, length_free=1, verifier="math", verifier_limit_s=1.0)
    functions, weights = verified_rewards(config, load_format("stratos"))
    assert [function.__name__ for function in functions] == list(reward_checks.VERIFIED) and weights == [0.5] * 3


def test_servers_alone_may_share_the_devices_of_an_engine(tmp_path):
    run = ["teacher_rlt_tiny", "vllm_tensor_parallel_size=2", "dry_run=true", f"results_dir={tmp_path}"]
    done = launch("launch.py", "--servers=2", "0", *run)
    assert done.returncode == 0, done.stderr
    assert "use_vllm_server: true" in done.stdout and "warm-up teacher_sft_tiny would run first" in done.stdout
    refused = launch("launch.py", "--servers=3", "0", *run)
    assert (
        refused.returncode == 1 and "does not divide the 3 devices of the servers: use one of [1, 3]" in refused.stderr
    )


def test_a_missing_column_is_named_with_those_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Q", "answer": "A"}\n')
    with pytest.raises(ValueError, match="has no column 'solution'; found answer, question"):
        make_plan(config_of(f"dataset_id_or_path={path}", EMBEDDED))


def test_a_file_with_no_more_rows_than_are_held_out_is_refused_before_any_warm_up(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"question": "{n}?", "solution": "{n}"}}\n' for n in range(4)))
    for held_out, says in ((4, "eval_size=4 leaves nothing of 4 rows to train on"), (3, None)):
        config = config_of(
            f"dataset_id_or_path={path}", f"eval_size={held_out}", f"output_dir={tmp_path}/run", EMBEDDED
        )
        if says is None:
            make_plan(config)
            continue
        with pytest.raises(ValueError, match=says):
            make_plan(config)


def test_evaluation_rows_among_the_training_rows_are_refused(tmp_path):
    for name, questions in (("train", ["1+1?", "2+2?"]), ("eval", ["3+3?", "2+2? "])):
        lines = [f'{{"question": "{q}", "solution": "4"}}\n' for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [f"dataset_id_or_path={tmp_path}/train.jsonl", f"eval_dataset_id_or_path={tmp_path}/eval.jsonl"]
    with pytest.raises(ValueError, match=r"^1 evaluation rows are among the training rows, the first: '2\+2\?"):
        make_plan(config_of(*sources, EMBEDDED))


def test_an_output_folder_of_another_run_is_refused_and_a_longer_run_is_not(tiny_teacher, tmp_path):
    out, named = f"output_dir={tmp_path}", f"model_name_or_path={tiny_teacher}"
    config = config_of(out, named)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(ValueError, match=r"different run \(beta: 0.04 there, 0.1 now\)"):
        make_plan(config_of(out, named, "beta=0.1"))
    make_plan(config_of(out, named, "beta=0.1", "overwrite_output_dir=true"))
    make_plan(config_of(out, named, "max_steps=99", "save_steps=7"))


def test_a_token_is_neither_printed_nor_written_nor_taken_for_another_run(tiny_teacher, tmp_path, capsys):
    run = [f"output_dir={tmp_path}", f"model_name_or_path={tiny_teacher}", "hub_token=hf_secret"]
    prepare_output(config_of(*run))
    plan = make_plan(config_of(*run))
    assert plan.config["hub_token"] == "hf_secret"
    show(plan)
    assert "hub_token: <hidden>" in capsys.readouterr().out
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"different run \(hub_token: <hidden> there, None now\)"):
        make_plan(config_of(*run[:2]))


def test_a_folder_that_no_run_wrote_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that no run here wrote"):
        make_plan(
            config_of(
                f"output_dir={tmp_path}",
                "overwrite_output_dir=true",
                "model_name_or_path=embedded/smollm2-135m-instruct",
            )
        )


def test_not_enough_disk_is_said_before_the_run(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("rlt.planning.machine.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="GiB are free"):
        make_plan(config_of(f"output_dir={tmp_path / 'run'}", EMBEDDED))


def test_a_refused_run_prints_one_line_and_ends_with_an_error(tmp_path):
    done = launch("train.py", "num_generations=5", f"output_dir={tmp_path / 'run'}", **HUB_OFF)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "use one of" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_imports_no_model_or_engine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = (
        "import sys, runpy; sys.argv = ['train.py', 'teacher_rlt', 'dry_run=true']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "assert not {'torch', 'vllm', 'transformers', 'trl'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning, missing: run teacher_rlt needs a GPU" in done.stdout
    assert "warm-up teacher_sft would run first" in done.stdout
    assert "missing for warm-up teacher_sft: run teacher_sft needs a GPU" in done.stderr


def test_a_warm_up_runs_unless_it_is_complete_or_a_model_is_named(tmp_path):
    given = [f"results_dir={tmp_path}", "report_to=null", "seed=2"]
    config, folder = config_of(*given), tmp_path / "teacher_sft_tiny"
    shared = ["run_cfg=teacher_sft_tiny", f"results_dir='{tmp_path}'", "report_to=null"]
    started, arguments = with_warmup(config, given)
    assert arguments == [*shared, "per_device_train_batch_size=4"]
    assert with_warmup(config, given, devices=4)[1] == [*shared, "per_device_train_batch_size=2"]
    assert started == {**config, "model_name_or_path": str(folder)} != config
    with pytest.raises(ValueError, match="warm-up teacher_sft_tiny: .*multiple of 16 devices"):
        with_warmup(config, given, devices=16)
    for named in ("++model_name_or_path=mine", "model_cfg=qwen05bi"):
        own = {**config, "model_name_or_path": "mine"}
        assert with_warmup(own, [named]) == (own, None)
    complete(config_of(*shared), steps=42)
    assert with_warmup(config, given, devices=16) == (started, None)  # it is there, whatever could make it


@pytest.mark.parametrize(("steps", "says"), [(42, "holds a different run .learning_rate: 1.0 there"), (2, None)])
def test_what_stands_in_a_warm_ups_folder_must_be_that_warm_up_and_whole(steps, says, tmp_path):
    given = [f"results_dir={tmp_path}", "report_to=null"]
    complete(config_of("teacher_sft_tiny", *given, *(["learning_rate=1.0"] if says else ["max_steps=2"])), steps)
    if not says:
        assert with_warmup(config_of(*given), given)[1]
        return
    with pytest.raises(ValueError, match=f"warm-up teacher_sft_tiny: .*{says}"):
        with_warmup(config_of(*given), given)


def complete(config: dict, steps: int) -> None:
    """Leave what a finished run leaves, but for its model."""
    prepare_output(config)
    (Path(config["output_dir"]) / "COMPLETE").write_text(f'{{"steps": {steps}, "epochs": 1.0}}')


def test_overwriting_deletes_neither_what_the_run_reads_nor_what_no_run_wrote(tiny_teacher, tmp_path):
    config = config_of(f"model_name_or_path={tiny_teacher}", f"output_dir={tmp_path}", "overwrite_output_dir=true")
    (tmp_path / "config.yaml").write_text("name: somebody's project\n")
    with pytest.raises(ValueError, match="holds files that no run here wrote"):
        make_plan(config)
    prepare_output({**config, "overwrite_output_dir": False})
    assert make_plan(config)
    shutil.copytree(tiny_teacher, tmp_path / "checkpoint-5")
    for key in ("model_name_or_path", "student_model", "resume_from"):
        with pytest.raises(ValueError, match=f"overwrite_output_dir=true would delete {key}="):
            make_plan({**config, key: str(tmp_path / "checkpoint-5")})


def test_a_run_that_began_with_a_checkpoint_needs_it_no_longer_once_it_has_its_own(tmp_path):
    started = config_of(EMBEDDED, f"output_dir={tmp_path / 'run'}", f"resume_from={tmp_path}")
    prepare_output(started)
    gone, without = {**started, "resume_from": str(tmp_path / "gone")}, {**started, "resume_from": None}
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        make_plan(gone)
    with pytest.raises(ValueError, match="holds a different run .resume_from"):
        make_plan(without)
    (tmp_path / "run" / "checkpoint-7").mkdir()
    assert make_plan(without)
    with pytest.raises(ValueError, match="holds a different run .resume_from"):
        make_plan({**started, "resume_from": str(tmp_path / "run" / "checkpoint-7")})


@pytest.mark.parametrize(
    "value", [None, True, 7, 1e-5, "it's {b}", [1, "a b"], {"a": {"b": [None, "c,d"]}, "e": "f:g"}]
)
def test_a_value_is_read_again_by_hydra(value):
    override = OverridesParser.create().parse_override(f"key={as_value(value)}")
    assert override.value() == value or str(override.value()) == value


@given(st.text(alphabet="\\'\"ab $,=", max_size=8))
def test_text_of_quotes_and_backslashes_is_read_again_by_hydra(text):
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text


def test_a_stage_gets_nested_settings_with_the_folders_of_earlier_ones():
    settings = {"dataset_kwargs": {"data_dir": "{a}/rows", "keep": True}, "reward_functions": ["x", "{a}"], "seed": 3}
    stages = [{"name": "a", "run": "teacher_sft_tiny"}, {"name": "b", "run": "student_sft_tiny", "set": settings}]
    second = stages_of({"output_dir": "/out", "seed": 1, "report_to": None, "stages": stages})[1]
    read = OverridesParser.create().parse_overrides(second.arguments[-3:])
    assert [one.value() for one in read] == [{"data_dir": "/out/a/rows", "keep": True}, ["x", "/out/a"], 3]


def test_secrets_are_hidden_in_a_pipelines_stages_too():
    stages = [{"name": "a", "run": "b", "set": {"hub_token": "hf_x", "seed": 1}}]
    shown = hide_secrets({"stages": stages, "hub_token": "hf_x", "api_key": None})
    assert shown == {
        "stages": [{"name": "a", "run": "b", "set": {"hub_token": "<hidden>", "seed": 1}}],
        "hub_token": "<hidden>",
        "api_key": None,
    }


def test_a_sweep_gives_each_job_a_folder_of_its_own(tmp_path):
    done = launch("train.py", "-m", "seed=1,2", "dry_run=true", f"output_dir={tmp_path}")
    folders = [line for line in done.stdout.splitlines() if line.startswith("output_dir")]
    assert folders == [f"output_dir: {tmp_path}-sweep/seed={seed}" for seed in (1, 2)], done.stderr


def test_every_folder_of_the_tree_has_its_file():
    assert {p.name for p in Path(ROOT, "cfgs").iterdir()} == {*GROUPS, "gates", "train.yaml", "score.yaml"}
