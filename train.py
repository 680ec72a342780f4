"""One entry for every run: compose the configuration, plan, build, train.

    ./launch_mono.sh [RUN] [key=value ...]        or, in the environment:  python train.py [RUN] [key=value ...]

A run file's `warmup_run` goes first, in a process of its own, unless it is complete or a model was named.
"""

import difflib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from checks import JOBS, check_keys, key_names, known_keys
from launching import PREEMPTED, folder_lock
from memory import choose_profile, gpu_memory_gib
from models.versions import check_versions, requirements_file
from plan import BEFORE_A_RUN, MARKER, Plan, make_plan

ROOT = Path(__file__).resolve().parent
CFGS = ROOT / "cfgs"
GROUPS = ("data_cfg", "model_cfg", "trainer_cfg", "run_cfg", "memory_cfg")
WEIGHT_KEYS = {"use_peft", "load_in_4bit", "load_in_8bit"}  # belong together: naming one leaves all to the run
SECRET = ("token", "password", "secret", "api_key")

logger = logging.getLogger("train")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CFGS / group).glob("*.yaml") if path.stem != "base")


def read_overrides(arguments: list[str], known: set[str]) -> list[tuple[str, str, str]]:
    """(argument, key without plus signs, value) of each override.

    Raises:
        ValueError: an unknown key, or a value that cannot be read.
    """
    found = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            raise ValueError(f"{argument!r} cannot be read: write key=value, and quote special characters") from None
        key, _, value = argument.partition("=")
        name = key.lstrip("+~")
        if name not in known and not name.startswith("hydra"):
            close = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"unknown key {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
        found.append((argument, name, value))
    return found


def rewrite_arguments(arguments: list[str]) -> list[str]:
    """Command line to Hydra overrides: a bare run name becomes `run_cfg=`, and a known key needs no plus sign.

    Raises:
        ValueError: no such run, group option or key, or a value that cannot be read.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    named = [a if "=" in a else f"run_cfg={Path(a).name.removesuffix('.yaml')}" for a in arguments if a not in flags]
    rewritten = []
    for argument, name, value in read_overrides(named, key_names() | set(GROUPS)):
        if name in GROUPS:
            for choice in value.split(","):
                choice = Path(choice).name.removesuffix(".yaml")
                if choice not in options(name) and (name, choice) != ("memory_cfg", "null"):
                    raise ValueError(f"{name}={choice} does not exist: use one of {', '.join(options(name))}")
        plain = name in key_names() and not argument.startswith(("+", "~"))
        rewritten.append(f"++{argument}" if plain else argument)
    return flags + rewritten


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
        raise ValueError(f"memory_cfg with {config['run_name']}: it is for runs that train")
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


def apply_warmup(config: dict, given: list[str]) -> str | None:
    """Start from the warm-up's model unless one was named; returns the warm-up that has yet to run."""
    if config["warmup_run"] is None or named_keys(given) & {"model_name_or_path", "model_cfg"}:
        return None
    # A warm-up takes none of the run's overrides, so it stands in the default results folder.
    folder = Path(yaml.safe_load((CFGS / "train.yaml").read_text())["results_dir"]) / config["warmup_run"]
    config["model_name_or_path"] = str(folder)
    return None if (folder / MARKER).is_file() else config["warmup_run"]


def hide_secrets(config: dict) -> dict:
    return {k: ("<hidden>" if v and k.endswith(SECRET) else v) for k, v in config.items()}


def prepare_output(config: dict) -> None:
    """Make the output folder, or empty it when asked to, and write the resolved configuration into it."""
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if config["overwrite_output_dir"] and (folder / "config.yaml").is_file():
        for path in folder.iterdir():  # not the folder itself, which is locked
            if path.name in BEFORE_A_RUN:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shown = hide_secrets(config)
    aside = folder / "config.yaml.tmp"
    aside.write_text(yaml.safe_dump({**shown, "overwrite_output_dir": False}, sort_keys=True))
    os.replace(aside, folder / "config.yaml")


def prepare_wandb(config: dict) -> None:
    """Offline unless logged in, and the same W&B run after a resume."""
    if config["report_to"] != "wandb":
        return
    folder = Path(config["output_dir"])
    id_file = folder / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    os.environ.setdefault("WANDB_MODE", "online" if logged_in else "offline")
    os.environ.setdefault("WANDB_PROJECT", "rlt")
    os.environ |= {
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": id_file.read_text().strip(),
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
    }


def finish(trainer, config: dict) -> None:
    """The final model and tokenizer, adapters merged on request, and the marker that says so."""
    folder = Path(config["output_dir"])
    trainer.save_model(str(folder))  # together with all ranks
    if not trainer.is_world_process_zero():
        return
    trainer.processing_class.save_pretrained(str(folder))
    if config["save_merged_model"] and config["use_peft"]:
        from models.paths import merged_model_path

        merged_model_path(folder, config["trust_remote_code"])
    (folder / MARKER).write_text(json.dumps({"steps": trainer.state.global_step, "epochs": trainer.state.epoch}))


def train(plan: Plan) -> None:
    """Run a plan to its end, as one process or as one rank of several, and say what came of it.

    What trains nothing is the `run` of a module of its own (collect.py, evaluate.py, pipeline.py). A run that is asked
    to stop exits with `PREEMPTED`, once it has saved.
    """
    if plan.config["trainer"] == "pipeline":
        importlib.import_module("pipeline").run(plan)
        return
    from trainers.preemption import StopOnSignal
    from trainers.ranks import is_one_of_several, meet

    if is_one_of_several():
        meet(plan.config.get("ddp_timeout", 1800))
    if plan.config["trainer"] in JOBS:
        with StopOnSignal() as stop:
            importlib.import_module(plan.config["trainer"]).run(plan, stop)
        return

    with StopOnSignal() as stop:
        trainer, evaluation = _train(plan, stop)
        if stop.stopped:
            if trainer.is_world_process_zero():
                logger.warning("stopped after step %d and saved: the same command continues", trainer.state.global_step)
            sys.exit(PREEMPTED)
        finish(trainer, plan.config)
    if not trainer.is_world_process_zero():
        return
    sentence = evaluation.sentence() if evaluation else None
    result = f"{plan.config['run_name']}: {trainer.state.global_step} steps, model in {plan.config['output_dir']}"
    sys.stdout.write(f"{result}\n{sentence}\n" if sentence else f"{result}\n")


def _train(plan: Plan, stop):
    """The trainer, once it has trained, and its held-out evaluation."""
    from trainers.build import build_trainer, quiet_libraries
    from trainers.checkpoints import damage_of, last_checkpoint, newest
    from trainers.ranks import RollCall, is_one_of_several

    quiet_libraries()
    trainer, evaluation = build_trainer(plan)
    for callback in (stop, *([RollCall()] if is_one_of_several() else [])):
        trainer.add_callback(callback)
    checkpoint = newest(plan.config["resume_from"], last_checkpoint(plan.config["output_dir"]))
    if checkpoint:
        if damage := damage_of(Path(checkpoint)):
            raise ValueError(f"resume_from={checkpoint} is damaged: {damage}")
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, evaluation


def is_complete(config: dict) -> bool:
    """Whether an earlier life of the run came to the end that is asked for now."""
    marker = Path(config["output_dir"]) / MARKER
    if config["overwrite_output_dir"] or config["resume_from"] or not marker.is_file():
        return False
    if config["trainer"] in JOBS:
        return True
    done = json.loads(marker.read_text())
    if config["max_steps"] > 0:
        return done["steps"] >= config["max_steps"]
    return done["epochs"] >= config["num_train_epochs"]


def run(config: dict, given: list[str]) -> None:
    apply_memory_profile(config, given)
    warmup = apply_warmup(config, given)
    plan = make_plan(config, pending_warmup=warmup)
    if config["dry_run"]:
        return show(plan)
    if is_complete(config):
        sys.stdout.write(f"{config['output_dir']} is complete; overwrite_output_dir=true starts again\n")
        return
    if warmup is not None:
        logger.info("warm-up first: %s", warmup)
        subprocess.run([sys.executable, str(ROOT / "train.py"), f"run_cfg={warmup}"], check=True)
    with folder_lock(config["output_dir"]):
        prepare_output(config)
        prepare_wandb(config)
        train(plan)


def show(plan: Plan, sharding: str | None = None) -> None:
    """What a dry run prints."""
    sys.stdout.write(f"{yaml.safe_dump(plan.config, sort_keys=True)}\n{plan.report()}\n")
    missing = list(plan.missing)
    if plan.pending_warmup:
        missing.append(f"model {plan.config['model_name_or_path']}: warm-up {plan.pending_warmup} would run first")
    if plan.config["trainer"] == "pipeline":
        missing += importlib.import_module("pipeline").problems(plan, sharding)
    sys.stdout.writelines(f"warning, missing: {line}\n" for line in missing)


def _sweeps(override: str) -> bool:
    return OverridesParser.create().parse_override(override).is_sweep_override()


@hydra.main(version_base="1.3", config_path="cfgs", config_name="train")
def job(cfg) -> None:
    config = OmegaConf.to_container(cfg, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # Each job in a process of its own: an engine is not given back within one.
        keys = {o.partition("=")[0] for o in sys.argv if "=" in o and _sweeps(o)}
        swept = ",".join(o.lstrip("+") for o in overrides if o.partition("=")[0] in keys)
        own = [*overrides, f"output_dir='{config['output_dir']}/{swept}'"]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *own], check=True)
        return
    try:
        run(config, overrides)
    except ValueError as error:
        fail(error)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 1)


def fail(error: Exception) -> None:
    """One clear line; the traceback only on request."""
    if os.environ.get("RLT_TRACEBACK"):
        raise error
    sys.exit(f"error: {' '.join(str(error).split())}")


def compose_config(arguments: list[str]) -> tuple[dict, list[str]]:
    """The resolved, flat configuration of a command line, and its overrides.

    Raises:
        ValueError: as `rewrite_arguments`.
    """
    overrides = rewrite_arguments(arguments)
    GlobalHydra.instance().clear()  # a pipeline's stages are composed inside its own run
    with initialize_config_dir(str(CFGS), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        full = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in full.items() if key != "hydra"}, overrides


def prepare() -> None:
    """What every process of a run does first."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    for library in ("bitsandbytes", "trl", "torchao", "vllm"):
        logging.getLogger(library).setLevel(logging.ERROR)
    os.chdir(ROOT)
    # Read by torch at its first allocation: a large buffer on the CPU then costs a few page faults, not hundreds.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for line in check_versions(requirements_file()):
        logger.warning("%s", line)


def main() -> None:
    prepare()
    try:
        sys.argv[1:] = rewrite_arguments(sys.argv[1:])
    except ValueError as error:
        fail(error)
    job()


if __name__ == "__main__":
    main()
