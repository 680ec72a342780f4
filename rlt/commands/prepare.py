"""`prepare.py`: the door of preparations for machines that train nothing, such as a cluster's login node.

    python prepare.py [RUN] [key=value ...]      RUN: a preparation's run file; prepare_tiny, if none is named

It is the job of `./launch_mono.sh prepare_tiny`, in this process, without a GPU.
"""

import sys

from rlt.commands.begin import begin, prepare_process
from rlt.errors import Refused, fail, usage
from rlt.jobs import run_plan
from rlt.planning.configuration import compose_config
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.schema import profile_of

DEFAULT = "prepare_tiny"
USAGE = """usage: .venv/bin/python prepare.py [RUN] [key=value ...]   e.g. prepare_rlt sources=[my/rows.jsonl]
       .venv/bin/python prepare.py RUN dry_run=true       what would happen
       .venv/bin/python prepare.py RUN stage=report       what its stages kept and dropped so far
keys: cfgs/preparation/base.yaml; docs/data.md has the stages and formats"""


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{USAGE}\n")
        return
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        usage(f"prepare.py has no option {flags[0]}\n{USAGE}")
    if not any("=" not in argument or argument.startswith("run_cfg=") for argument in arguments):
        arguments = [DEFAULT, *arguments]
    prepare_process()
    try:
        config, given = compose_config(arguments)
        if not profile_of(config).prepares:
            raise Refused(f"{config['run_name']} is no preparation: ./launch_mono.sh {config['run_name']} runs it")
        sys.exit(begin(resolve(config, given), _no_warm_up, _start))
    except Refused as error:
        fail(error)


def _no_warm_up(arguments: list[str]) -> int:
    raise AssertionError(arguments)  # a preparation starts from no model


def _start(plan: Plan) -> int:
    run_plan(plan)
    return 0
