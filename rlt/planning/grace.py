"""How long a run may take to stop, by the figures that an earlier life of it left."""

import logging
from pathlib import Path

from rlt.durable import read_json_lines
from rlt.runs.folder import METRICS
from rlt.schema import Training

# Parts of a step that are not left half-way, in seconds, as a GRPO run logs them.
WHOLE_PARTS = ("generation/seconds", "scoring/seconds")
UPDATE = "update/seconds"  # of all micro-batches, between which a step may be left

logger = logging.getLogger("rlt")


def longest_part_s(folder: Path, accumulation_steps: int) -> float | None:
    """Seconds of the longest part of the last step that is in a folder's metrics; None: there is none."""
    steps = [row for row in read_json_lines(folder / METRICS) if UPDATE in row]
    if not steps:
        return None
    return max(*(steps[-1].get(part, 0.0) for part in WHOLE_PARTS), steps[-1][UPDATE] / accumulation_steps)


def warn_of_short_grace(settings: Training, accumulation_steps: int) -> None:
    """Say it where a run that is asked to stop would be ended before it has saved."""
    longest = longest_part_s(Path(settings.output_dir), accumulation_steps)
    if longest is not None and longest > settings.stop_grace_s:
        logger.warning(
            "asked to stop, this run may take %.0f s, by its last step, and stop_grace_s=%.0f: let the signal come "
            "earlier (Slurm: --signal=TERM@%.0f), or make a step smaller",
            *(longest, settings.stop_grace_s, 2 * longest),
        )
