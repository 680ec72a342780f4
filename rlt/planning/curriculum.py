"""A curriculum by length: which share of the tokens comes from which length of packed rows, up to which step."""

from dataclasses import dataclass
from typing import Any

from rlt.errors import Refused
from rlt.schema import PretrainSettings, SFTSettings

TOLERANCE = 1e-6  # of the sum of shares


@dataclass(frozen=True)
class Phase:
    """Steps with one mixture.

    Args:
        until_step: the first step that is no longer in it; None: the last phase.
        shares: of the tokens, by the length of packed rows.
    """

    until_step: int | None
    shares: dict[int, float]


def phases_of(curriculum: list[Any], max_length: int) -> list[Phase]:
    """The key `curriculum`: [{until_step: 100, buckets: {512: 0.7, 1024: 0.3}}, ...].

    Raises:
        Refused: the first phase that cannot be, and why.
    """
    phases, before = [], 0
    for number, entry in enumerate(curriculum):
        place = f"curriculum: phase {number}"
        if not isinstance(entry, dict) or not {"until_step", "buckets"} >= entry.keys() >= {"buckets"}:
            raise Refused(f"{place} must be {{until_step: a number, buckets: {{length: share}}}}, it is {entry}")
        last, until = number == len(curriculum) - 1, entry.get("until_step")
        if until is None and not last or until is not None and (not isinstance(until, int) or until <= before):
            raise Refused(f"{place}: until_step={until} must be a step after {before}")
        phases.append(Phase(until, _shares(entry["buckets"], max_length, place)))
        before = until or before
    if not phases:
        raise Refused("curriculum is empty: leave it null, or give it a phase")
    return phases


def _shares(buckets: Any, max_length: int, place: str) -> dict[int, float]:
    try:
        shares = {int(length): float(share) for length, share in buckets.items()}
    except (AttributeError, TypeError, ValueError):
        raise Refused(f"{place}: buckets={buckets} must be {{length: share}}") from None
    for length, share in shares.items():
        if length < 1 or max_length % length:
            raise Refused(f"{place}: {length} does not divide max_length={max_length}, so a step's tokens would differ")
        if share <= 0:
            raise Refused(f"{place}: the share of {length} is {share}, it must be above 0")
    if not shares or abs(sum(shares.values()) - 1) > TOLERANCE:
        raise Refused(f"{place}: shares {shares} must add up to 1")
    return dict(sorted(shares.items()))


def check_curriculum(settings: PretrainSettings | SFTSettings) -> None:
    """Raises:
    Refused: as `phases_of`, or the run has no number of steps.
    """
    assert settings.curriculum is not None
    if settings.max_length is None:
        raise Refused("curriculum needs max_length, the pack_length of its preparation")
    if settings.max_steps < 1:
        raise Refused(f"curriculum with max_steps={settings.max_steps}: rows are drawn without end, set max_steps")
    phases_of(settings.curriculum, settings.max_length)
