"""One rank of a run: `python -m rlt.commands.rank PLANS LAUNCHER`, started by launch.py.

PLANS is a folder with a plan for each number of machines that the run can go on with, LAUNCHER the id of the process
that started this one, with which this one ends.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlt.commands.begin import prepare_process
from rlt.errors import Refused, fail
from rlt.jobs import DEFAULT_LIMIT_S, run_plan
from rlt.launching.lifetime import PREEMPTED, REFUSED, end_with, keep_last_words, last_words
from rlt.launching.speech import speak_on
from rlt.places import RANK_SECRETS_VARIABLE
from rlt.planning.plan import Plan


def read_plan(folder: Path) -> Plan:
    """The plan for as many machines as there are, with its secrets, which nothing inherits from here.

    Raises:
        Refused: the run cannot go on with as many.
    """
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    file = folder / f"plan-{machines}.json"
    if not file.is_file():
        raise Refused(f"{machines} machines are left, and the batch does not divide: the same command continues")
    plan = Plan(**json.loads(file.read_text(encoding="utf-8")))
    secrets = json.loads(os.environ.pop(RANK_SECRETS_VARIABLE, "{}"))
    return replace(plan, config={**plan.config, **secrets})


def main() -> None:
    end_with(int(sys.argv[2]))
    if os.environ["LOCAL_RANK"] != "0":
        os.dup2(2, 1)  # into its log: the terminal is the first rank's
    speak_on()
    folder = Path(sys.argv[1])
    sys.excepthook = partial(keep_last_words, last_words(folder, os.environ["RANK"]))
    prepare_process()
    run_rank(lambda: read_plan(folder))


def run_rank(plan: Callable[[], Plan]) -> None:
    """Run what `plan` gives as one of several ranks, and leave their group."""
    from backends.roll_call import are_on_one_machine, leave_group, open_store_on_loopback

    store = open_store_on_loopback(DEFAULT_LIMIT_S) if are_on_one_machine() else None
    try:
        run_plan(plan())
    except Refused as error:
        fail(error, REFUSED)
    except SystemExit as ended:  # asked to stop, and saved
        leave_group(together=ended.code == PREEMPTED)
        raise
    leave_group()
    del store  # held until here


if __name__ == "__main__":
    main()
