"""The configuration of a command line: Hydra's tree with a run's name and keys, a memory profile, a warm-up's model.

Also how keys are read (`read_overrides`, score.py's too).
"""

import difflib
import logging
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from checks import JOBS, check_keys, key_names, known_keys
from errors import Refused
from memory import choose_profile, gpu_memory_gib
from plan import check_output, is_complete, make_plan

CFGS = Path(__file__).resolve().parent / "cfgs"
GROUPS = ("data_cfg", "model_cfg", "trainer_cfg", "run_cfg", "memory_cfg")
WEIGHT_KEYS = {"use_peft", "load_in_4bit", "load_in_8bit"}  # belong together: naming one leaves all to the run

logger = logging.getLogger("train")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CFGS / group).glob("*.yaml") if path.stem != "base")


def read_overrides(arguments: list[str], known: set[str]) -> list[tuple[str, str, str]]:
    """(argument, key without plus signs, value) of each override.

    Raises:
        Refused: an unknown key, or a value that cannot be read.
    """
    found = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            raise Refused(f"{argument!r} cannot be read: write key=value, and quote special characters") from None
        key, _, value = argument.partition("=")
        name = key.lstrip("+~")
        if name not in known and not name.startswith("hydra"):
            close = difflib.get_close_matches(name, known, n=3)
            raise Refused(f"unknown key {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
        found.append((argument, name, value))
    return found


def rewrite_arguments(arguments: list[str]) -> list[str]:
    """Command line to Hydra overrides: a bare run name becomes `run_cfg=`, and a known key needs no plus sign.

    Raises:
        Refused: no such run, group option or key, or a value that cannot be read.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    named = [a if "=" in a else f"run_cfg={Path(a).name.removesuffix('.yaml')}" for a in arguments if a not in flags]
    rewritten = []
    for argument, name, value in read_overrides(named, key_names() | set(GROUPS)):
        if name in GROUPS:
            for choice in value.split(","):
                choice = Path(choice).name.removesuffix(".yaml")
                if choice not in options(name) and (name, choice) != ("memory_cfg", "null"):
                    raise Refused(f"{name}={choice} does not exist: use one of {', '.join(options(name))}")
        plain = name in key_names() and not argument.startswith(("+", "~"))
        rewritten.append(f"++{argument}" if plain else argument)
    return flags + rewritten


def compose_config(arguments: list[str]) -> tuple[dict, list[str]]:
    """The resolved, flat configuration of a command line, and its overrides.

    Raises:
        Refused: as `rewrite_arguments`, or a key has several values.
    """
    overrides = rewrite_arguments(arguments)
    for several in filter(sweeps, overrides):
        key, _, value = several.lstrip("+").partition("=")
        raise Refused(f"{key}={value} names several values: a list is [{value}], and only launch_mono.sh -m sweeps")
    GlobalHydra.instance().clear()  # a pipeline's stages are composed inside its own run
    with initialize_config_dir(str(CFGS), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        full = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in full.items() if key != "hydra"}, overrides


def sweeps(override: str) -> bool:
    """Whether an override names several values, as `seed=1,2` does."""
    return OverridesParser.create().parse_override(override).is_sweep_override()


def named_keys(given: list[str]) -> set[str]:
    return {override.lstrip("+").partition("=")[0] for override in given}


def memory_profiles() -> dict[str, dict]:
    """The settings of each profile, by name."""
    files = [path for path in (CFGS / "memory_cfg").glob("*.yaml") if path.stem != "auto"]
    return {path.stem: yaml.safe_load(path.read_text()) for path in files}


def apply_memory_profile(config: dict, given: list[str], devices: int = 1, sharding: str = "ddp") -> None:
    """Lay the chosen profile over the run, under what the command line names; keys of other trainers are left out."""
    chosen = config.pop("memory_profile", None)
    if chosen is None:
        return
    if config["trainer"] in JOBS:
        raise Refused(f"memory_cfg with {config['run_name']}: it is for runs that train")
    check_keys(config)
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
        return settings

    if chosen != "auto":
        config.update(of_this_run(chosen))
        return
    gpu_gib = gpu_memory_gib()
    if gpu_gib is None:
        logger.info("memory_cfg=auto: no GPU, the run stays as it is")
        return
    profiles = {name: of_this_run(profile) for name, profile in memory_profiles().items()}
    name, merged, peak = choose_profile(config, profiles, gpu_gib, devices, sharding)
    config.update(merged)
    logger.info("memory_cfg=auto: %s, about %.1f of the GPU's %.1f GiB", name, peak, gpu_gib)
    if peak > gpu_gib:
        logger.warning("that is more than there is: lower max_completion_length, or take a smaller model")


def apply_warmup(config: dict, given: list[str], devices: int = 1, sharding: str = "ddp") -> list[str] | None:
    """Start from the warm-up's model unless one was named; returns the arguments of a warm-up that has yet to run.

    Of the run's own keys it takes only where results and logs go, and its micro-batch has to fit the devices.

    Raises:
        Refused: it cannot run on these devices, or another run stands in its folder.
    """
    if config["warmup_run"] is None or named_keys(given) & {"model_name_or_path", "model_cfg"}:
        return None
    name = config["warmup_run"]
    arguments = [f"run_cfg={name}", f"results_dir={quoted(config['results_dir'])}"]
    arguments.append(f"report_to={config['report_to'] or 'null'}")
    own, _ = compose_config(arguments)
    config["model_name_or_path"] = own["output_dir"]
    try:
        if is_complete(own):  # whatever it took to make
            check_output(own)
            return None
        share, each = own["train_batch_size"] // devices, own["per_device_train_batch_size"]
        if fits := [size for size in range(1, each + 1) if share and share % size == 0]:
            arguments.append(f"per_device_train_batch_size={fits[-1]}")
            own["per_device_train_batch_size"] = fits[-1]
        plan = make_plan({**own, "dry_run": config["dry_run"]}, devices, sharding=sharding)
    except Refused as error:
        raise Refused(f"warm-up {name}: {error}") from None
    for line in plan.missing:  # of a dry run: any other was refused for the first of them
        logger.warning("missing for warm-up %s: %s", name, line)
    return arguments


def quoted(path: str) -> str:
    """As Hydra reads it whatever characters it has; a sweep's folders have an equals sign."""
    return "'" + path.replace("'", "\\'") + "'"
