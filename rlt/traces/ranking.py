"""Ranks of scored completions within their question, and how often each source of completions has the best."""

import math
from collections import defaultdict

from rlt.errors import Refused


def ranks(rewards: list[float]) -> list[int]:
    """Each completion's place among the completions of its question: 1 for the highest reward.

    Ties keep their order; completions without a finite reward come last.
    """
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i] if math.isfinite(rewards[i]) else math.inf)
    places = [0] * len(rewards)
    for place, index in enumerate(order, start=1):
        places[index] = place
    return places


def sources_of(row: dict, count: int) -> list[str]:
    """Who wrote each completion: the row's list `sources`, else their places in the list.

    Raises:
        Refused: as many sources as completions are needed.
    """
    sources = row.get("sources")
    if sources is None:
        return [f"completion {place}" for place in range(count)]
    if not isinstance(sources, list) or len(sources) != count:
        raise Refused(f"{count} completions need a list of {count} 'sources', not {sources!r}")
    return [str(source) for source in sources]


def summary(rows: list[tuple[list[str], list[float]]]) -> dict[str, dict[str, float]]:
    """By source: completions, questions won, their share of the questions that the source took part in, mean rank, mean
    finite reward. Completions of equal reward share the win and their mean place.

    Args:
        rows: of each question the sources and the rewards of its completions.
    """
    places, rewards, won, met = (defaultdict(list), defaultdict(list), defaultdict(float), defaultdict(int))
    for sources, values in rows:
        finite = [value for value in values if math.isfinite(value)]
        best = max(finite, default=None)
        for source, place, reward in zip(sources, ranks(values), values, strict=True):
            if math.isfinite(reward):
                rewards[source].append(reward)
                place = 1 + sum(value > reward for value in finite) + (finite.count(reward) - 1) / 2
            places[source].append(place)
            won[source] += (reward == best) / values.count(best) if best is not None else 0
        for source in set(sources):
            met[source] += 1
    return {
        source: {
            "completions": len(places[source]),
            "won": won[source],
            "win_share": won[source] / met[source],
            "mean_rank": sum(places[source]) / len(places[source]),
            "mean_reward": sum(rewards[source]) / len(rewards[source]) if rewards[source] else math.nan,
        }
        for source in sorted(places)
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """One line a source, the most wins first."""
    width = max(map(len, found))
    lines = [f"{'source':<{width}}  completions    won  win share  mean rank  mean reward"]
    for source, f in sorted(found.items(), key=lambda item: -item[1]["win_share"]):
        lines.append(
            f"{source:<{width}}  {f['completions']:>11}  {f['won']:>5.4g}  {f['win_share']:>9.3f}"
            f"  {f['mean_rank']:>9.2f}  {f['mean_reward']:>11.3f}"
        )
    return "\n".join([*lines, ""])
