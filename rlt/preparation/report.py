"""The funnel as text: what each stage kept, and why it dropped the rest."""

import math

from rlt.preparation.run import StageResult

MOST_REASONS = 5


def report(results: list[StageResult]) -> str:
    """A line per stage, then its reasons."""
    lines = [f"{'stage':<16}{'in':>12}{'kept':>12}{'share':>8}   dropped"]
    for result in results:
        counts = result.counts
        share = f"{math.floor(1000 * counts.kept / counts.read) / 10}%" if counts.read else "-"
        reasons = [f"{reason} {count}" for reason, count in counts.dropped.most_common(MOST_REASONS)]
        more = len(counts.dropped) - MOST_REASONS
        reasons += [f"{more} more reasons"] if more > 0 else []
        lines.append(f"{result.name:<16}{counts.read:>12}{counts.kept:>12}{share:>8}   {'; '.join(reasons)}".rstrip())
    return "\n".join(lines)
