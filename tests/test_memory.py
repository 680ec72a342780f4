"""Memory profiles: what wins over what, which one a GPU gets, and the estimate by hand."""

import json
import os

import pytest
import torch
from conftest import EMBEDDED, config_of
from safetensors.torch import save_file

from rlt.planning.machine import check_models_exist, gpu_memory_gib
from rlt.planning.memory import GIB, estimate_memory, parameters, shape_of, token_budget
from rlt.planning.plan import make_plan
from rlt.planning.profiles import choose_profile, memory_profiles, with_memory_profile

PROFILES = sorted(memory_profiles())


def profiled(*overrides: str) -> dict:
    return with_memory_profile(config_of(*overrides), list(overrides))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("run", ["teacher_rlt_mono", "teacher_rlt_tiny", "teacher_sft_tiny"])
def test_every_profile_is_planned(run, profile, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = profiled(run, f"memory_cfg={profile}", "dry_run=true")
    plan = make_plan(config)
    assert plan.memory_gib
    assert plan.config["use_peft"] == (profile != "80gb")


def test_an_adapters_folder_is_as_large_as_its_base(tiny_teacher, tmp_path):
    base = parameters({"model_name_or_path": tiny_teacher, "model_size": 7})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny_teacher}))
    (tmp_path / "adapter_model.safetensors").touch()
    assert base < 1e8
    assert parameters({"model_name_or_path": str(tmp_path), "model_size": 7}) == base


def test_a_profile_wins_over_the_run_and_the_command_line_over_both():
    run = config_of("teacher_rlt_mono")
    assert (run["per_device_train_batch_size"], run["load_in_4bit"]) == (4, False)
    config = profiled("teacher_rlt_mono", "memory_cfg=12gb", "per_device_train_batch_size=1")
    assert (config["per_device_train_batch_size"], config["load_in_4bit"]) == (1, True)


@pytest.mark.parametrize(
    ("gpu_gib", "model_size", "expected"),
    [
        (11.99, 1.54, "12gb"),
        (15.0, 1.54, "16gb"),  # what cards of 16 and of 24 GB show at the least
        (22.49, 1.54, "24gb"),
        (79.6, 1.54, "80gb"),
        (79.6, 7.62, "24gb"),  # all weights of 7B with AdamW need 140 GiB
        (8.0, 1.54, "12gb"),  # none is made for so little: the smallest
    ],
)
def test_the_largest_profile_that_fits(gpu_gib, model_size, expected):
    config = profiled("teacher_rlt_mono", f"model_size={model_size}")
    name, merged, peak = choose_profile(config, memory_profiles(), gpu_gib)
    assert name == expected
    assert peak == max(estimate_memory(merged, gpu_gib).values())


def test_a_profile_whose_run_does_not_fit_its_card_is_refused_with_one_that_does(monkeypatch):
    with pytest.raises(
        ValueError, match=r"update .* of teacher_rlt_mono would take .* GiB of the card's 80.0: use memo"
    ):
        profiled("teacher_rlt_mono", "memory_cfg=80gb", "model_size=7.6")
    with pytest.raises(ValueError, match="use a smaller model, or a smaller max_completion_length"):
        profiled("teacher_rlt_mono", "memory_cfg=12gb", "model_size=70")
    assert not profiled("teacher_rlt_mono", "memory_cfg=80gb", "model_cfg=qwen3bi")["use_peft"]
    monkeypatch.setattr("rlt.planning.profiles.gpu_memory_gib", lambda: 12.0)  # what is there counts, not the name
    with pytest.raises(ValueError, match=r"of the card's 12.0: use memory_cfg=12gb"):
        profiled("teacher_rlt_mono", "memory_cfg=80gb")


def test_an_adapter_of_a_profile_learns_at_ten_times_the_rate_of_all_weights():
    rate = config_of("teacher_rlt_tiny")["learning_rate"]
    assert profiled("teacher_rlt_tiny", "memory_cfg=24gb")["learning_rate"] == pytest.approx(10 * rate)
    assert profiled("teacher_rlt_tiny", "memory_cfg=80gb")["learning_rate"] == rate
    assert profiled("teacher_rlt_tiny", "memory_cfg=24gb", "learning_rate=3e-6")["learning_rate"] == 3e-6
    assert profiled("teacher_rlt_tiny", "memory_cfg=24gb", "use_peft=false")["learning_rate"] == rate
    own = config_of("teacher_rlt_mono")["learning_rate"]  # of an adapter already
    assert profiled("teacher_rlt_mono", "memory_cfg=24gb")["learning_rate"] == own == 2e-5


def test_a_rate_that_would_not_move_an_adapter_is_said(caplog, tmp_path):
    keys = ["use_peft=true", "learning_rate=1e-6", f"output_dir={tmp_path}"]
    make_plan(config_of(f"model_name_or_path={EMBEDDED}", *keys))
    assert "learning_rate=1e-06 with use_peft=true" in caplog.text


def test_naming_one_kind_of_weights_leaves_all_of_them_to_the_command_line():
    config = profiled("teacher_rlt_mono", "memory_cfg=16gb", "load_in_4bit=true")
    assert [config[key] for key in ("use_peft", "load_in_4bit", "load_in_8bit")] == [True, True, False]


def test_a_profile_changes_the_micro_batch_and_not_how_many_completions_are_made_at_once():
    run = config_of("teacher_rlt_mono", "generation_aggregation_steps=8")
    config = config_of("teacher_rlt_mono", "memory_cfg=12gb", "generation_aggregation_steps=8")
    config = with_memory_profile(config, ["teacher_rlt_mono", "memory_cfg=12gb"])  # as if the run's file said eight
    for c in (run, config):
        assert c["per_device_train_batch_size"] * c["generation_aggregation_steps"] == 32


def test_without_a_budget_a_pass_takes_a_micro_batch():
    config = profiled("teacher_rlt_mono", "memory_cfg=12gb")
    assert config["logprob_token_budget"] is None
    assert token_budget(config) == 4096 + 2 * 4096


@pytest.mark.parametrize(("visible", "expected"), [(None, 8.0), ("1", 24.0), ("0,1", 8.0), ("", None), ("-1", None)])
def test_only_gpus_that_the_process_may_use_are_asked(visible, expected, tmp_path, monkeypatch):
    sizes = 'sizes=\'8192 24576\'; for a in "$@"; do [ "$last" = -i ] && chosen=$a; last=$a; done'
    listed = "set -- $sizes; for i in $(echo ${chosen:-0,1} | tr , ' '); do eval echo \\${$((i + 1))}; done"
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{sizes}\n{listed}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory_gib() == expected


def test_a_gpu_that_does_not_answer_in_time_is_not_seen(tmp_path, monkeypatch, caplog):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("rlt.planning.machine.NVIDIA_SMI_TIMEOUT_S", 0.2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_memory_gib() is None
    assert "nvidia-smi did not answer within 0.2 s: no GPU is seen" in caplog.text


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n".encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "model.safetensors is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        (b"", "model.safetensors is cut short, or is no safetensors file"),
        (b"\xff" * 8, "model.safetensors is cut short, or is no safetensors file"),
        (b"\x05" + bytes(7) + b"hello", "model.safetensors is cut short, or is no safetensors file"),
    ],
)
def test_a_model_file_that_is_not_whole_is_named_before_anything_is_loaded(tmp_path, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_models_exist({"model_name_or_path": str(tmp_path)})
    assert parameters({"model_name_or_path": str(tmp_path), "model_size": 7}) == 7e9  # until it is there


def test_a_shard_that_lacks_its_last_bytes_is_named_with_its_size(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("one", "two"):
        save_file({"weight": torch.zeros(5, 7)}, tmp_path / f"{name}.safetensors")
    config = {"model_name_or_path": str(tmp_path), "model_size": 7}
    assert parameters(config) == 2 * 5 * 7
    whole = (tmp_path / "two.safetensors").stat().st_size
    os.truncate(tmp_path / "two.safetensors", whole - 1)
    with pytest.raises(ValueError, match=f"two.safetensors is cut short \\({whole - 1} of {whole} bytes\\)"):
        check_models_exist({"model_name_or_path": str(tmp_path)})
    assert parameters(config) == 7e9


def test_a_model_in_a_place_that_the_system_does_not_look_into_is_estimated_by_its_size():
    assert parameters({"model_name_or_path": "x" * 300, "model_size": 7}) == 7e9  # no name may be so long


def test_a_model_with_other_names_in_its_configuration_is_estimated_by_its_size(tmp_path):
    (tmp_path / "config.json").write_text('{"n_embd": 64, "n_layer": 2}')
    config = config_of(f"model_name_or_path={tmp_path}", "model_size=1.2")
    assert shape_of(config).layers == pytest.approx(21.544, abs=1e-3)  # layers³ = 1.2e9 / 12 / 100²
    assert estimate_memory(config)


def test_auto_takes_the_profile_of_the_gpu_and_leaves_the_cpu_alone(monkeypatch):
    monkeypatch.setattr("rlt.planning.profiles.gpu_memory_gib", lambda: 12.0)
    assert profiled("teacher_rlt_mono", "memory_cfg=auto") == profiled("teacher_rlt_mono", "memory_cfg=12gb")
    monkeypatch.setattr("rlt.planning.profiles.gpu_memory_gib", lambda: None)
    assert profiled("teacher_rlt_mono", "memory_cfg=auto") == config_of("teacher_rlt_mono")


def test_the_estimate_of_full_training_by_hand():
    config = config_of(f"model_name_or_path={EMBEDDED}", "use_vllm=false", "per_device_train_batch_size=8")
    tokens, hidden, layers, size = 512 + 8 * 192, 576, 30, 134_515_008
    by_hand = size * (4 + 6 + 8) + tokens * hidden * layers * 50 + 2**26 * 6 + size * 4  # the reference is the student
    assert estimate_memory(config)["update (policy, optimizer)"] == pytest.approx(by_hand / GIB)


@pytest.mark.parametrize("key", ["mamba_n_heads", "ssm_state_size", "linear_num_key_heads"])
def test_a_model_with_recurrent_layers_reads_a_prompt_for_each_completion(key, tmp_path):
    plain = of_size(tmp_path / "plain", 1000)
    recurrent = of_size(tmp_path / "recurrent", 1000)
    (tmp_path / "recurrent/config.json").write_text(json.dumps({**SHAPE, key: 4}))
    both = [
        phases(f"model_name_or_path={path}", "student_model=null", "per_device_train_batch_size=8", "num_generations=8")
        for path in (plain, recurrent)
    ]
    more = 7 * 512 * 64 * 2 * 50  # prompts of 512 tokens, hidden size, layers, bytes
    assert both[1]["update"] - both[0]["update"] == pytest.approx(more)


SHAPE = {"hidden_size": 64, "num_hidden_layers": 2}


def of_size(folder, numbers: int) -> str:
    """A model's folder with so many parameters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    save_file({"weight": torch.zeros(numbers)}, folder / "model.safetensors")
    return str(folder)


def phases(*overrides: str, devices: int = 1, sharding: str = "ddp") -> dict[str, float]:
    """Bytes by phase."""
    found = estimate_memory(config_of("use_vllm=false", *overrides), None, devices, sharding)
    return {name.split()[0]: gib * GIB for name, gib in found.items()}


def test_a_student_of_another_size_is_counted_by_its_own_parameters(tmp_path):
    policy, student = of_size(tmp_path / "policy", 1000), of_size(tmp_path / "student", 5000)
    without = phases(f"model_name_or_path={policy}", "student_model=null")
    for name, wanted in ((student, 5000), (f"{tmp_path}/gone", 1000), ("some/hub-model", 1000), (policy, 0)):
        found = phases(f"model_name_or_path={policy}", f"student_model={name}")
        for phase in found:
            assert found[phase] - without[phase] == pytest.approx(2 * wanted, abs=0.01), (name, phase)
    in_float32 = phases(f"model_name_or_path={policy}", f"student_model={student}", "bf16=false")
    assert in_float32["generation"] - without["generation"] == pytest.approx(4 * 5000, abs=0.01)
    # One that the reference would leave behind is loaded beside it, however it is named.
    moved = phases(f"model_name_or_path={policy}", f"student_model={policy}", "sync_ref_model=true")
    assert moved["generation"] - without["generation"] == pytest.approx(2 * 1000, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "sharding", "per_parameter"),
    [
        ([], "ddp", 0),  # it waits in the host's memory, as the student does
        (["sync_ref_model=true"], "ddp", 4),
        ([], "zero1", 2),  # DeepSpeed casts it, and keeps it whole
        ([], "zero3", 2 / 4),
        ([], "fsdp", 4 / 4),
        ([], "offload", 0),
        (["bf16=false"], "zero2", 4),
    ],
)
def test_a_reference_waits_unless_it_moves_or_is_held_with_the_policy(overrides, sharding, per_parameter, tmp_path):
    policy, student = of_size(tmp_path / "policy", 1000), of_size(tmp_path / "student", 5000)
    run = [f"model_name_or_path={policy}", f"student_model={student}", "offload_untrained_models=true", *overrides]
    there = {"devices": 4, "sharding": sharding}
    found, without = phases(*run, **there), phases(*run, "sync_ref_model=false", "beta=0", **there)
    for phase in ("generation", "update"):
        assert found[phase] - without[phase] == pytest.approx(1000 * per_parameter, abs=0.01), phase


def test_the_profiles_differ_in_values_only():
    first, *others = memory_profiles().values()
    assert all(profile.keys() == first.keys() for profile in others)
