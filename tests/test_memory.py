"""Memory profiles: what wins over what, which one a GPU gets, and the estimate by hand."""

import pytest
from conftest import EMBEDDED, config_of

from memory import GIB, choose_profile, estimate_memory
from plan import make_plan
from train import apply_memory_profile, memory_profiles

PROFILES = sorted(memory_profiles())


def profiled(*overrides: str) -> dict:
    config = config_of(*overrides)
    apply_memory_profile(config, list(overrides))
    return config


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("run", ["teacher_rlt_mono", "teacher_rlt_tiny", "teacher_sft_tiny"])
def test_every_profile_is_planned(run, profile, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = profiled(run, f"memory_cfg={profile}", "dry_run=true")
    plan = make_plan(config)
    assert plan.memory_gib
    assert plan.config["use_peft"] == (profile != "80gb")


def test_a_profile_wins_over_the_run_and_the_command_line_over_both():
    run = config_of("teacher_rlt_mono")
    assert (run["per_device_train_batch_size"], run["load_in_4bit"]) == (4, False)
    config = profiled("teacher_rlt_mono", "memory_cfg=12gb", "per_device_train_batch_size=8")
    assert (config["per_device_train_batch_size"], config["load_in_4bit"]) == (8, True)


@pytest.mark.parametrize(
    ("gpu_gib", "model_size", "expected"),
    [
        (11.99, 1.54, "12gb"),
        (15.99, 1.54, "16gb"),
        (23.99, 1.54, "24gb"),
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


def test_auto_takes_the_profile_of_the_gpu_and_leaves_the_cpu_alone(monkeypatch):
    monkeypatch.setattr("train.gpu_memory_gib", lambda: 12.0)
    assert profiled("teacher_rlt_mono", "memory_cfg=auto") == profiled("teacher_rlt_mono", "memory_cfg=12gb")
    monkeypatch.setattr("train.gpu_memory_gib", lambda: None)
    assert profiled("teacher_rlt_mono", "memory_cfg=auto") == config_of("teacher_rlt_mono")


def test_the_estimate_of_full_training_by_hand():
    config = config_of(f"model_name_or_path={EMBEDDED}", "use_vllm=false", "per_device_train_batch_size=8")
    tokens, hidden, layers, size = 512 + 8 * 192, 576, 30, 134_515_008
    by_hand = size * (4 + 6 + 8) + tokens * hidden * layers * 50 + 2**26 * 6 + size * (4 + 2)
    assert estimate_memory(config)["update (policy, optimizer)"] == pytest.approx(by_hand / GIB)


def test_the_profiles_differ_in_values_only():
    first, *others = memory_profiles().values()
    assert all(profile.keys() == first.keys() for profile in others)
