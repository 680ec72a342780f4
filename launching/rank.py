"""One rank of a run: `python -m launching.rank PLAN LAUNCHER`, started by launch.py.

PLAN is the file of a plan, LAUNCHER the id of the process that started this one, with which this one ends.
"""

import json
import sys
from pathlib import Path

from errors import Refused, fail
from launching.lifetime import end_with
from plan import Plan
from train import prepare, train


def main() -> None:
    end_with(int(sys.argv[2]))
    prepare()
    try:
        train(Plan(**json.loads(Path(sys.argv[1]).read_text())))
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
