"""Makes a W&B workspace with the panels of report.py, once for a project:

.venv/bin/python scripts/wandb_workspace.py ENTITY [--project=rlt]         # you are logged in to W&B
.venv/bin/python scripts/wandb_workspace.py ENTITY --json                  # prints what would be sent, offline
"""

import argparse
import json
import sys

import wandb

from rlt.errors import Refused, fail
from rlt.reports.workspace import workspace
from rlt.runs.dashboard import PROJECT
from trainers.tracking import tracker_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity", help="a user or a team on W&B")
    parser.add_argument("--project", default=PROJECT)
    parser.add_argument("--json", action="store_true", help="print the workspace, send nothing")
    asked = parser.parse_args()
    made = workspace(asked.entity, asked.project, tracker_name)
    if asked.json:
        sys.stdout.write(f"{json.dumps(made._spec, indent=1)}\n")  # the package has no public way to it
        return
    try:
        sys.stdout.write(f"{made.save().url}\n")
    except wandb.Error as error:
        fail(Refused(f"W&B did not take the workspace of {asked.entity}/{asked.project}: {error}"))


if __name__ == "__main__":
    main()
