"""Ranks of scored completions within their question, and how often each source of completions has the best."""

import math
from collections import defaultdict
from random import Random

from rlt.errors import Refused

SELECTORS = ("reward", "likelihood", "rsr", "random")


def worth(row: dict, select: str, seed: int, place: int) -> float:
    """What the best trace of a question has most of; NaN where the row has an empty cell.

    Args:
        row: has the column `select` unless that is "random": `rsr` is the better the lower (arXiv 2601.14249).
        seed, place: of the run, and of the trace among those of its question; they decide what "random" draws.
    """
    if select == "random":
        return Random(f"{seed}/{' '.join(row['question'].split())}/{place}").random()
    value = math.nan if row[select] is None else row[select]
    return -value if select == "rsr" else value


def check_select(select: str) -> None:
    if select not in SELECTORS:
        raise Refused(f"select={select}: use one of {', '.join(SELECTORS)}")


def check_columns(rows: list[dict], select: str, place: str) -> None:
    """That rows have what they are selected by; a table has an empty cell where a value is not finite.

    Args:
        place: where the rows stand, for the message.

    Raises:
        Refused: a row lacks the column, or no row has a value.
    """
    if select == "random":
        return
    if any(select not in row for row in rows) or all(row[select] is None for row in rows):
        raise Refused(f"select={select}: {place} has rows without {select!r}: {REMEDIES[select]}")


SCORED_WITH = "score them with report_rsr=true, which reads the student's log-probs and ranks"
REMEDIES = {"reward": "score them, with teacher_model and student_model", "likelihood": SCORED_WITH, "rsr": SCORED_WITH}


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
