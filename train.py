"""One entry for every run: compose the configuration, plan, build, train.

    ./launch_mono.sh [RUN] [key=value ...]        or, in the environment:  python train.py [RUN] [key=value ...]

A run file's `warmup_run` goes first, in a process of its own, unless it is complete or a model was named.
"""

import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from checks import JOBS
from configuration import apply_memory_profile, apply_warmup, quoted, rewrite_arguments, sweeps
from data.learned import saved_configuration
from errors import Refused, fail
from launching import PREEMPTED, folder_lock, run_child
from models.paths import merged_model_path
from models.versions import check_versions, requirements_file
from plan import BEFORE_A_RUN, MARKER, SECRET, Plan, hide_secrets, is_complete, make_plan

ROOT = Path(__file__).resolve().parent

logger = logging.getLogger("train")


def prepare_output(config: dict) -> None:
    """Make the output folder, or empty it when asked to, and write the resolved configuration into it."""
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if config["overwrite_output_dir"] and saved_configuration(folder) is not None:
        # Not the folder itself, which is locked, and last what says that it is a run's.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.yaml"):
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
    from trainers.checkpoints import kill_point

    kill_point("finishing")
    folder = Path(config["output_dir"])
    trainer.save_model(str(folder))  # together with all ranks
    if not trainer.is_world_process_zero():
        return
    trainer.processing_class.save_pretrained(str(folder))
    if config["save_merged_model"] and config["use_peft"]:
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
            raise Refused(f"resume_from={checkpoint} is damaged: {damage}")
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, evaluation


def run(config: dict, given: list[str]) -> None:
    apply_memory_profile(config, given)
    warmup = apply_warmup(config, given)
    plan = make_plan(config, warms_up_first=warmup is not None)
    if config["dry_run"]:
        return show(plan)
    if is_complete(config):
        sys.stdout.write(f"{config['output_dir']} is complete; overwrite_output_dir=true starts again\n")
        return
    if warmup is not None:
        logger.info("warm-up first: %s", " ".join(warmup))
        run_child(["train.py", *warmup])
    if config["trainer"] == "pipeline":
        importlib.import_module("pipeline").check(plan)
    with folder_lock(config["output_dir"]):
        prepare_output(config)
        prepare_wandb(config)
        train(plan)


def show(plan: Plan, sharding: str | None = None) -> None:
    """What a dry run prints."""
    sys.stdout.write(f"{yaml.safe_dump(hide_secrets(plan.config), sort_keys=True)}\n{plan.report()}\n")
    missing = list(plan.missing)
    if plan.warms_up_first:
        name = plan.config["warmup_run"]
        missing.append(f"model {plan.config['model_name_or_path']}: warm-up {name} would run first")
    if plan.config["trainer"] == "pipeline":
        missing += importlib.import_module("pipeline").problems(plan, sharding)
    sys.stdout.writelines(f"warning, missing: {line}\n" for line in missing)


@hydra.main(version_base="1.3", config_path="cfgs", config_name="train")
def job(cfg) -> None:
    config = OmegaConf.to_container(cfg, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # Each job in a process of its own: an engine is not given back within one.
        keys = {o.partition("=")[0] for o in sys.argv if "=" in o and sweeps(o)}
        swept = ",".join(o.lstrip("+") for o in overrides if o.partition("=")[0] in keys)
        folder = quoted(f"{config['output_dir']}-sweep/{swept}")  # beside that of the run alone
        run_child(["train.py", *overrides, f"output_dir={folder}"])
        return
    try:
        run(config, overrides)
    except Refused as error:
        fail(error)


def check_sweep(arguments: list[str]) -> None:
    """Refuse to sweep with a secret.

    Raises:
        Refused: Hydra would write a secret into its record of a sweep.
    """
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments if "=" in argument]
    if {"-m", "--multirun"} & set(arguments) and (secret := [key for key in keys if key.endswith(SECRET)]):
        raise Refused(f"{secret[0]} with -m: a sweep's overrides are written to disk; log in to the hub instead")


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
        check_sweep(sys.argv[1:])
    except Refused as error:
        fail(error)
    job()


if __name__ == "__main__":
    main()
