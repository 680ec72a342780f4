"""Memory profiles: what is laid over a run so that it fits a GPU, and which of them fits."""

import logging
from typing import Any

import yaml

from rlt.errors import Refused
from rlt.places import CFGS
from rlt.planning.checks import check_keys, known_keys
from rlt.planning.configuration import named_keys
from rlt.planning.machine import gpu_memory_gib
from rlt.planning.memory import estimate_memory
from rlt.schema import profile_of

logger = logging.getLogger("rlt")

WEIGHT_KEYS = {"use_peft", "load_in_4bit", "load_in_8bit"}  # belong together: naming one leaves all to the run
# An adapter's best learning rate in those of all weights, whatever the task (Schulman and Thinking Machines Lab,
# "LoRA Without Regret", 2025).
ADAPTER_RATE = 10
RESERVE = 0.92  # of a GPU's memory: the rest is its context and what lies between blocks


def memory_profiles() -> dict[str, dict]:
    """The settings of each profile, by name."""
    files = [path for path in (CFGS / "memory_cfg").glob("*.yaml") if path.stem != "auto"]
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}


def with_memory_profile(
    config: dict[str, Any], given: list[str], devices: int = 1, sharding: str = "ddp"
) -> dict[str, Any]:
    """The run with the chosen profile laid over it, under what the command line names.

    Keys of other trainers are left out. `memory_profile` itself is no key of the result.

    Raises:
        Refused: the run trains nothing, or has an unknown key.
    """
    chosen = config.get("memory_profile")
    config = {key: value for key, value in config.items() if key != "memory_profile"}
    if chosen is None:
        return config
    check_keys(config)
    if not profile_of(config).trains:
        raise Refused(f"memory_cfg with {config['run_name']}: it is for runs that train")
    named = named_keys(given)
    if named & WEIGHT_KEYS:
        named |= WEIGHT_KEYS
    own = known_keys(config["trainer"]).keys() - named

    def of_this_run(profile: dict) -> dict:
        settings = {key: value for key, value in profile.items() if key in own}
        steps, batch = config.get("generation_aggregation_steps"), config["per_device_train_batch_size"]
        if steps and "generation_aggregation_steps" in own:  # as many completions are generated at once as before
            new = settings.get("per_device_train_batch_size", batch)
            settings["generation_aggregation_steps"] = max(1, steps * batch // new)
        if settings.get("use_peft") and not config["use_peft"] and "learning_rate" in own:
            settings["learning_rate"] = ADAPTER_RATE * config["learning_rate"]
        return settings

    gpu_gib = gpu_memory_gib()
    profiles = {name: of_this_run(profile) for name, profile in memory_profiles().items()}
    if chosen != "auto":
        merged = {**config, **of_this_run(chosen)}
        check_it_fits(merged, profiles, gpu_gib or chosen["gpu_gib"], devices, sharding)
        return merged
    if gpu_gib is None:
        logger.info("memory_cfg=auto: no GPU, the run stays as it is")
        return config
    name, merged, peak = choose_profile(config, profiles, gpu_gib, devices, sharding)
    logger.info("memory_cfg=auto: %s, about %.1f of the GPU's %.1f GiB", name, peak, gpu_gib)
    if peak > gpu_gib:
        logger.warning("that is more than there is: lower max_completion_length, or take a smaller model")
    return merged


def check_it_fits(
    config: dict[str, Any], profiles: dict[str, dict[str, Any]], gpu_gib: float, devices: int, sharding: str
) -> None:
    """Refuse a profile whose run does not fit the card, by the estimate.

    Raises:
        Refused: the phase that takes too much, and what would fit.
    """
    phase, peak = max(estimate_memory(config, gpu_gib, devices, sharding).items(), key=lambda item: item[1])
    if peak <= gpu_gib:
        return
    name, _, least = choose_profile(config, profiles, gpu_gib, devices, sharding)
    remedy = f"memory_cfg={name}" if least <= gpu_gib else "a smaller model, or a smaller max_completion_length"
    raise Refused(
        f"memory_cfg: {phase} of {config['run_name']} would take {peak:.1f} GiB of the card's {gpu_gib:.1f}: "
        f"use {remedy}"
    )


def choose_profile(
    config: dict[str, Any],
    profiles: dict[str, dict[str, Any]],
    gpu_gib: float,
    devices: int = 1,
    sharding: str = "ddp",
) -> tuple[str, dict[str, Any], float]:
    """The largest profile that fits a GPU; the smallest where none does.

    Args:
        config: the flat configuration that a profile is laid over.
        profiles: settings by name; a name begins with the GB of the card it is made for.
        gpu_gib: the card's memory.
        devices, sharding: as in `estimate_memory`.

    Returns:
        its name, the configuration with it, and the estimate's largest phase in GiB.
    """
    by_size = sorted(profiles, key=lambda name: int(name.removesuffix("gb")), reverse=True)
    for name in by_size:
        merged = {**config, **profiles[name]}
        peak = max(estimate_memory(merged, gpu_gib, devices, sharding).values())
        made_for_less = int(name.removesuffix("gb")) <= gpu_gib * 1.1  # a card of "24 GB" shows 22.5 to 24
        if name == by_size[-1] or (made_for_less and peak <= gpu_gib * RESERVE):
            return name, merged, peak
    raise AssertionError("no profiles")
