"""One rank of a run: `python -m rlt.commands.rank PLAN LAUNCHER`, started by launch.py.

PLAN is the file of a plan, LAUNCHER the id of the process that started this one, with which this one ends.
"""

import json
import sys
from pathlib import Path

from rlt.commands.begin import prepare_process
from rlt.errors import Refused, fail
from rlt.jobs import run_plan
from rlt.launching.lifetime import end_with
from rlt.planning.plan import Plan


def main() -> None:
    end_with(int(sys.argv[2]))
    prepare_process()
    try:
        run_plan(Plan(**json.loads(Path(sys.argv[1]).read_text())))
    except Refused as error:
        fail(error)
    except SystemExit:  # asked to stop, and saved
        leave_group()
        raise
    leave_group()


def leave_group() -> None:
    """Threads of a process group that outlive the interpreter abort a run that came to its end."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
