"""The configuration of a command line: Hydra's tree with a run's name and keys, a memory profile, a warm-up's model.

Also how keys are read (`read_overrides`, score.py's too).
"""

import difflib
import logging
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from rlt.errors import Refused
from rlt.places import CFGS
from rlt.planning.checks import key_names
from rlt.runs.hidden import is_secret

# Keys whose values may be paths.
PATHS = frozenset(
    {
        *("results_dir", "output_dir", "model_name_or_path", "student_model", "teacher_model"),
        "dataset_id_or_path",
        *("eval_dataset_id_or_path", "resume_from", "compare_with", "trained_on", "reasoning_format"),
    }
)
GROUPS = ("data_cfg", "model_cfg", "trainer_cfg", "preparation", "run_cfg", "memory_cfg")
REWARDS = "trainer_cfg/reward_cfg"  # the group that `reward_cfg` names
REWARD_KEYS = {"answer_log_prob_coeff", "answer_weight"}  # one of them is in every file of that group

logger = logging.getLogger("rlt")


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
            key, _, value = argument.partition("=")
            if value and is_secret(argument):
                argument, value = f"{key}=<hidden>", "<hidden>"
            remedy = f"\"{key}='{value}'\" (the shell takes the outer quotes)" if value else "key=value"
            raise Refused(f"{argument!r} cannot be read: write {remedy}") from None
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
    named = [a.removeprefix(f"{REWARDS}@") for a in named]  # as a sweep's jobs are given it
    rewards = [a for a in named if a.startswith("reward_cfg=")]
    named = [a for a in named if a not in rewards]
    for argument, name, value in read_overrides(named, key_names() | set(GROUPS)):
        if name in GROUPS:
            for choice in value.split(","):
                choice = Path(choice).name.removesuffix(".yaml")
                if choice not in options(name) and (name, choice) != ("memory_cfg", "null"):
                    raise Refused(f"{name}={choice} does not exist: use one of {', '.join(options(name))}")
                check_head(name, choice)
        plain = name in key_names() and not argument.startswith(("+", "~"))
        rewritten.append(f"++{argument}" if plain else argument)
    for argument in rewards:
        check_rewards(argument.removeprefix("reward_cfg="), [a for a in rewritten if not sweeps(a)])
    return flags + rewritten + [f"{REWARDS}@{argument}" for argument in rewards]


def check_rewards(value: str, others: list[str]) -> None:
    """One reward, or a list of them whose keys are laid over each other.

    Args:
        others: the other overrides of the command line.

    Raises:
        Refused: there is none of that name, or the run has no reward to choose.
    """
    check_reward_names(value)
    config = _composed(others)
    if not REWARD_KEYS & config.keys():
        raise Refused(f"reward_cfg={value}: {config['trainer']} runs have no reward to choose")


def check_reward_names(value: str) -> None:
    """Refuse what `reward_cfg` names and is not there."""
    for choice in value.strip("[]").split(","):
        if choice.strip() not in options(REWARDS):
            raise Refused(f"reward_cfg={value}: use one of {', '.join(options(REWARDS))}, or a list of them")


def check_head(group: str, choice: str) -> None:
    """A file of one's own says at its top where Hydra puts its keys.

    Raises:
        Refused: it does not.
    """
    file, package = CFGS / group / f"{choice}.yaml", "memory_profile" if group == "memory_cfg" else "_global_"
    head = f"# @package {package}"
    first = file.read_bytes().partition(b"\n")[0].decode(errors="replace").strip() if file.is_file() else head
    if not first.startswith("# @package"):
        raise Refused(f"cfgs/{group}/{choice}.yaml must begin with the line `{head}`, and no mark before it")


def compose_config(arguments: list[str]) -> tuple[dict, list[str]]:
    """The resolved, flat configuration of a command line, and its overrides.

    Raises:
        Refused: as `rewrite_arguments`, or a key has several values.
    """
    overrides = rewrite_arguments(arguments)
    for several in filter(sweeps, overrides):
        key, _, value = several.lstrip("+").partition("=")
        value = "<hidden>" if is_secret(several) else value
        raise Refused(f"{key}={value} names several values: a list is [{value}], and only launch_mono.sh -m sweeps")
    full = _composed(overrides)
    return {key: value for key, value in full.items() if key != "hydra"}, overrides


def _composed(overrides: list[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()  # a pipeline's stages are composed inside its own run
    with initialize_config_dir(str(CFGS), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return as_dict(cfg)


def as_dict(cfg: DictConfig, throw_on_missing: bool = False) -> dict[str, Any]:
    """A composed tree as plain values, interpolations resolved.

    Raises:
        MissingMandatoryValue: with `throw_on_missing`, a key has no value.
    """
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=throw_on_missing)
    assert isinstance(container, dict)
    return {str(key): _at_home(str(key), value) for key, value in container.items()}


def _at_home(key: str, value: Any) -> Any:
    """A path that begins with `~`, which a shell has left as it is, as the libraries would read it."""
    return str(Path(value).expanduser()) if key in PATHS and isinstance(value, str) and value.startswith("~") else value


def sweeps(override: str) -> bool:
    """Whether an override names several values, as `seed=1,2` does."""
    return OverridesParser.create().parse_override(override).is_sweep_override()


def named_keys(given: list[str]) -> set[str]:
    return {override.lstrip("+").partition("=")[0] for override in given}


def as_value(value: Any) -> str:
    """A value of a configuration as Hydra reads it behind `key=`."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(path: str) -> str:
    """As Hydra reads it whatever characters it has; a sweep's folders have an equals sign.

    A backslash counts only before a quote, and is written twice there.
    """
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), path) + "'"
