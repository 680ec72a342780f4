"""`train.py`: one process for every run: compose the configuration, plan, build, train.

    ./launch_mono.sh [RUN] [key=value ...]        or, in the environment:  python train.py [RUN] [key=value ...]

A run file's `warmup_run` goes first, in a process of its own, unless it is complete or a model was named. Under
torchrun this process is one of several ranks (`rlt.commands.torchrun`).
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from rlt.commands import torchrun
from rlt.commands.begin import begin, prepare_process
from rlt.errors import Refused, fail
from rlt.jobs import run_plan
from rlt.jobs.child import run_child, secret_overrides
from rlt.places import CFGS
from rlt.planning.configuration import as_dict, quoted, rewrite_arguments, sweeps
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.runs.hidden import is_secret


@hydra.main(version_base="1.3", config_path=str(CFGS), config_name="train")
def job(cfg) -> None:
    config = as_dict(cfg)
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # Each job in a process of its own: an engine is not given back within one.
        keys = {o.partition("=")[0] for o in sys.argv if "=" in o and sweeps(o)}
        swept = ",".join(o.lstrip("+") for o in overrides if o.partition("=")[0] in keys)
        folder = quoted(f"{config['output_dir']}-sweep/{swept}")  # beside that of the run alone
        run_child(["train.py", *overrides, f"output_dir={folder}"])
        return
    try:
        if config["restarts"]:
            raise Refused(
                f"restarts={config['restarts']} is for ./launch.sh, which watches over the processes of a run"
            )
        sys.exit(begin(resolve(config, overrides), warm_up, start))
    except Refused as error:
        fail(error)


def warm_up(arguments: list[str]) -> int:
    run_child(["train.py", *arguments])
    return 0


def start(plan: Plan) -> int:
    run_plan(plan)
    return 0


def check_sweep(arguments: list[str]) -> None:
    """Refuse to sweep with a secret.

    Raises:
        Refused: Hydra would write a secret into its record of a sweep.
    """
    secret = [argument.lstrip("+").partition("=")[0] for argument in arguments if is_secret(argument)]
    if {"-m", "--multirun"} & set(arguments) and secret:
        raise Refused(f"{secret[0]} with -m: a sweep's overrides are written to disk; log in to the hub instead")


def main() -> None:
    prepare_process()
    if torchrun.is_rank():
        sys.exit(torchrun.main(sys.argv[1:]))
    torchrun.forget_place()
    try:
        sys.argv[1:] = rewrite_arguments([*sys.argv[1:], *secret_overrides()])
        check_sweep(sys.argv[1:])
    except Refused as error:
        fail(error)
    job()
