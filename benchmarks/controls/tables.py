"""Tables and a figure, made of the results that are there and of nothing else."""

from collections import defaultdict
from collections.abc import Iterable
from math import isfinite, nan
from pathlib import Path

import records
import settings
from arms import ARMS, KNOWN, PRIMARY, seeds_of
from measures import EVERY_QUESTION
from over_seeds import Difference, correlation, paired, t_interval
from records import Result

from rlt.durable import write_whole
from rlt.estimates import Estimate

OF_TASK = "accuracy of "  # how work.py names it
TABLES, FIGURE = "tables.md", "tables.png"
MEASURES = {
    "reward": "reward",
    "rsr": "RSR",
    "right steps of explanations": "right steps, explanations",
    "right steps of answers": "right steps, answers",
    "position of the answer": "position of the answer",
    "tokens of explanations": "tokens, explanations",
    "tokens of answers": "tokens, answers",
    "questions": "questions",
    "steps": "steps",
    "entropy": "entropy",
}
FEWEST_SETS = 3  # of which a correlation is made

BySeed = dict[int, float]


def write(folder: Path) -> str:
    """Leaves `tables.md` and `tables.png` beside the results; returns the tables."""
    results, others = records.read_all(folder)
    text = "\n".join([*_heading(results), "", *_arms(results), "", *_differences(results), "", *_correlations(results)])
    if others:
        names = ", ".join(f"{one.arm}-{one.seed} ({one.commit})" for one in others)
        text += f"\n\nLeft out, as they are of another commit or other settings: {names}."
    write_whole(folder / TABLES, text + "\n")
    draw(folder / FIGURE, results)
    return text + "\n"


def figure_of(results: list[Result], name: str) -> dict[str, BySeed]:
    """One of the figures, by arm and seed, in the order of the plan."""
    found: dict[str, BySeed] = defaultdict(dict)
    for one in results:
        if name in one.figures:
            found[one.arm][one.seed] = one.figures[name]
    return {arm: found[arm] for arm in KNOWN if arm in found}


def _names(results: list[Result], beginning: str) -> list[str]:
    """Of figures, in the alphabet's order."""
    return sorted({name for one in results for name in one.figures if name.startswith(beginning)})


def subject(results: list[Result]) -> str:
    """The arm that all others are compared with."""
    return "rl" if any(one.arm == "rl" for one in results) else "rl-twice"


def differences(results: list[Result], name: str = "accuracy") -> dict[str, Difference]:
    """A figure of the subject's students minus that of every other arm's."""
    found, of = figure_of(results, name), subject(results)
    return {arm: paired(values, found[of]) for arm, values in found.items() if of in found and arm != of}


def _heading(results: list[Result]) -> list[str]:
    seeds = sorted({one.seed for one in results})
    lines = [f"{len(results)} results at commit {results[0].commit}, seeds {', '.join(map(str, seeds))}."]
    if seeds[0] >= settings.SEEDS["tuning"]:
        return [*lines, "These seeds are for tuning: they answer nothing that the plan asks."]
    there = {(one.arm, one.seed) for one in results}
    lacking = sum((arm, seed) not in there for arm in ARMS for seed in seeds_of(arm))
    return lines if not lacking else [*lines, f"INCOMPLETE: {lacking} of the plan's results are not there yet."]


def _arms(results: list[Result]) -> list[str]:
    words = {name: name.removeprefix(OF_TASK) for name in _names(results, OF_TASK)} | MEASURES
    found, others = figure_of(results, "accuracy"), {name: figure_of(results, name) for name in words}
    lines = [f"| arm | what its student learns from | seeds | held-out accuracy | {' | '.join(words.values())} |"]
    lines.append("|---" * (4 + len(words)) + "|")
    for arm, values in found.items():
        cells = [_mean(others[name].get(arm)) for name in words]
        accuracy = _interval(t_interval(list(values.values())))
        lines.append(f"| `{arm}` | {KNOWN[arm].words} | {len(values)} | {accuracy} | {' | '.join(cells)} |")
    return lines


def _differences(results: list[Result]) -> list[str]:
    """Those of the plan; then by task, for an analysis of them."""
    heads = (f"accuracy of `{subject(results)}` minus", "seeds", "mean, 95 % t-interval", "effect size", "by seed")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += _rows(results, "accuracy", "") + _rows(results, EVERY_QUESTION, ", every question once")
    for name in _names(results, OF_TASK):
        lines += _rows(results, name, f", {name.removeprefix(OF_TASK)} alone", of=PRIMARY)
    return lines


def _rows(results: list[Result], name: str, suffix: str, of: Iterable[str] = tuple(KNOWN)) -> list[str]:
    found, of_subject, lines = figure_of(results, name), figure_of(results, name).get(subject(results), {}), []
    for arm, one in differences(results, name=name).items():
        if arm not in of:
            continue
        shared = sorted(of_subject.keys() & found[arm])
        by_seed = ", ".join(f"{of_subject[seed] - found[arm][seed]:+.3f}" for seed in shared)
        named = f"**`{arm}`**" if arm in PRIMARY and not suffix else f"`{arm}`{suffix}"
        effect = f"{one.effect:+.2f}" if isfinite(one.effect) else ""
        cells = [named, str(one.seeds), _interval(one.estimate, signed=True), effect, by_seed]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sets_of(results: list[Result], name: str) -> list[Result]:
    """Every set of explanations that a teacher wrote, unedited, which has the figure."""
    as_written = [one for one in results if KNOWN[one.arm].kind == "traces" and KNOWN[one.arm].edit is None]
    return [one for one in as_written if isfinite(one.figures.get(name, nan))]


def _correlations(results: list[Result]) -> list[str]:
    lines = ["| over all sets of explanations | sets | correlation with the student's accuracy |", "|---|---|---|"]
    for name in ("reward", "rsr", "right steps of explanations"):
        every = sets_of(results, name)
        sampled = [one for one in every if KNOWN[one.arm].of == 1]  # the others were chosen by the reward
        for words, found in ((MEASURES[name], every), (f"{MEASURES[name]}, without `best-of-n`", sampled)):
            if len(found) >= FEWEST_SETS and (found is every or len(found) < len(every)):
                x, y = ([one.figures[key] for one in found] for key in (name, "accuracy"))
                r = correlation(x, y, [one.seed for one in found])
                lines.append(f"| {words} | {len(found)} | {r.signed} |")
    return lines


def _mean(values: BySeed | None) -> str:
    finite = [value for value in (values or {}).values() if isfinite(value)]
    return f"{sum(finite) / len(finite):.3g}" if finite else ""


def _interval(estimate: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if not isfinite(estimate.low):
        return f"{estimate.mean:{sign}.3f}"
    return estimate.signed if signed else str(estimate)


def draw(path: Path, results: list[Result]) -> None:
    """Accuracy by arm with every seed as a point; accuracy against reward over the sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = figure_of(results, "accuracy")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for place, (arm, values) in enumerate(found.items()):
        one = t_interval(list(values.values()))
        left.bar(place, one.mean, color="#1f6f8b" if arm in PRIMARY else "#9fc3cf")
        if isfinite(one.low):
            left.errorbar(place, one.mean, yerr=one.high - one.mean, fmt="none", ecolor="#333", capsize=3)
        left.scatter([place] * len(values), list(values.values()), color="#333", s=6, zorder=3)
    left.set(title="Students by what they learned from", ylabel="held-out accuracy", ylim=(0, None))
    left.set_xticks(range(len(found)), list(found), rotation=60, ha="right", fontsize=8)
    sets = sets_of(results, "reward")
    for arm in dict.fromkeys(one.arm for one in sets):
        mine = [one.figures for one in sets if one.arm == arm]
        right.scatter([its["reward"] for its in mine], [its["accuracy"] for its in mine], label=arm, s=18)
    right.set(title="Sets of explanations", xlabel="mean reward", ylabel="student's held-out accuracy")
    if sets:
        right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
