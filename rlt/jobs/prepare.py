"""Raw text and public formats become clean rows: `./launch_mono.sh prepare_tiny`, or `python prepare.py prepare_tiny`.

Leaves `prepared/` (what other runs read), `stages/` (what each stage kept, dropped and counted), `DATA_CARD.md` and
`funnel.png`. A stage whose settings and inputs are what they were is kept; after a kill the same command goes on.
"""

import errno
import sys
from pathlib import Path

from rlt.errors import Refused
from rlt.launching.lifetime import PREEMPTED
from rlt.planning.plan import Plan
from rlt.runs.dashboard import log_figures
from rlt.runs.folder import CARD, MARKER, mark_complete
from rlt.schema import PrepareSettings

FULL = (errno.ENOSPC, errno.EDQUOT)


def run(plan: Plan, stop) -> None:
    """Every stage that is not done, then the card.

    Args:
        stop: a `StopOnSignal`, asked between two tasks.
    """
    from rlt.preparation.card import is_of, write_card
    from rlt.preparation.engine import Stopped
    from rlt.preparation.report import report
    from rlt.preparation.run import prepare

    settings: PrepareSettings = plan.settings
    output = Path(settings.output_dir)
    stop.begin()
    try:
        results = prepare(settings, lambda: stop.asked)
    except Stopped:
        sys.exit(PREEMPTED)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Refused(f"the disk of output_dir={output} is full: with more room the same command goes on") from error
    kept, read = results[-1].counts.kept, results[0].counts.read
    if not (output / MARKER).is_file() or not is_of(output / CARD, results):
        write_card(settings, results)
        log_figures(plan.config, {f"rows/{result.name}": result.counts.kept for result in results})
        mark_complete(output, {"rows": kept})
    sys.stdout.write(f"{report(results)}\n{settings.run_name}: {kept} of {read} rows kept; {output / CARD}\n")


def show(plan: Plan) -> None:
    """What the stages that have ended kept and dropped (`stage=report`); nothing is run or written.

    Raises:
        Refused: no stage has ended.
    """
    from rlt.preparation.report import report
    from rlt.preparation.run import results_of

    results = results_of(Path(plan.settings.output_dir))
    if not results:
        raise Refused(f"stage=report: {plan.settings.output_dir} holds no stage that has ended")
    sys.stdout.write(f"{report(results)}\n")
