"""What came out of the replication: accuracies with intervals, paired differences, the correlation, a figure.

All seeds answer the same questions: intervals resample questions, each with its answers of all seeds.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import rows

from rlt.estimates import RESAMPLES, Estimate, bootstrap, paired_difference

ARMS = {
    "base": "the base model, untrained",
    "novice": "the novice that all students start from",
    "early": "student of the teacher's traces early in its warm-up",
    "warmup": "student of the warm-up teacher's traces",
    "rl": "student of the trained teacher's traces",
    "worked": "student of the generator's worked solutions",
}
ONCE = ("base", "novice")  # for all seeds
TEACHERS = ("early", "warmup", "rl")


def write(out: Path, seeds: range) -> str:
    """Figures, table and picture; returns the table."""
    found = {arm: accuracies(out, arm, seeds) for arm in ARMS}
    rewards = {(arm, seed): rows.mean_reward(out / str(seed) / arm / "traces") for arm in TEACHERS for seed in seeds}
    means = {(arm, seed): mean_of(found[arm], seed) for arm in TEACHERS for seed in seeds}
    r = correlation([rewards[key] for key in rewards], [means[key] for key in rewards])
    pooled = {arm: over_seeds(values) for arm, values in found.items()}
    differences = {arm: paired_difference(pooled["warmup"], pooled[arm]) for arm in ("early", "rl", "worked")}
    tasks = {row["question"]: row["task"] for row in rows.read(out / "questions" / "evaluate.jsonl")}
    text = table(pooled, rewards, differences, r, seeds, tasks) + by_seed(means, seeds)
    sets = [{"set": arm, "seed": s, "reward": rewards[arm, s], "accuracy": means[arm, s]} for arm, s in rewards]
    result = {
        "accuracy": {arm: vars(bootstrap(list(values.values()))) for arm, values in pooled.items()},
        "against the warm-up's": {arm: vars(value) for arm, value in differences.items()},
        "correlation": vars(r),
        "sets": sets,
    }
    (out / "replication.json").write_text(json.dumps(result, indent=1))
    (out / "replication.md").write_text(text)
    draw(out / "replication.png", pooled, sets, r)
    return text


def accuracies(out: Path, arm: str, seeds: range) -> dict[str, float]:
    """By seed and question; what is one for all seeds counts as the first's."""
    found = {}
    for seed in seeds[:1] if arm in ONCE else seeds:
        place = out / arm if arm in ONCE else out / str(seed) / arm
        read = json.loads((place / "evaluation" / "evaluation.json").read_text())["accuracy"]
        found |= {f"{seed} {question}": value for question, value in read.items()}
    return found


def over_seeds(values: dict[str, float]) -> dict[str, float]:
    """The mean over seeds of each question."""
    of_question = defaultdict(list)
    for key, value in values.items():
        of_question[key.partition(" ")[2]].append(value)
    return {question: float(np.mean(of_seeds)) for question, of_seeds in of_question.items()}


def by_seed(means: dict, seeds: range) -> str:
    gains = ", ".join(f"{means['rl', seed] - means['warmup', seed]:+.3f}" for seed in seeds)
    return f"\nThe trained teacher's student against the warm-up's, by seed: {gains}\n"


def mean_of(values: dict[str, float], seed: int) -> float:
    return float(np.mean([value for key, value in values.items() if key.startswith(f"{seed} ")]))


def correlation(x_N: list[float], y_N: list[float]) -> Estimate:
    """Pearson's, with the percentile bootstrap's interval over trace sets."""
    x_N, y_N = np.asarray(x_N), np.asarray(y_N)
    draws = np.random.default_rng(0).integers(0, len(x_N), size=(RESAMPLES, len(x_N)))
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of one set alone has none
        resampled = [np.corrcoef(x_N[draw], y_N[draw])[0, 1] for draw in draws]
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        return Estimate(float(np.corrcoef(x_N, y_N)[0, 1]), float(low), float(high))


def of_task(values: dict[str, float], task: str, tasks: dict[str, str]) -> float:
    return float(np.mean([value for question, value in values.items() if tasks[question] == task]))


def table(pooled: dict, rewards: dict, differences: dict, r: Estimate, seeds: range, tasks: dict[str, str]) -> str:
    names = sorted(set(tasks.values()))
    heads = ["", "held-out accuracy", *names, "against the warm-up's student", "mean reward of the traces"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, words in ARMS.items():
        difference = differences[arm].signed if arm in differences else ""
        reward = f"{np.mean([rewards[arm, seed] for seed in seeds]):.2f}" if arm in TEACHERS else ""
        shares = [f"{of_task(pooled[arm], name, tasks):.3f}" for name in names]
        cells = [words, str(bootstrap(list(pooled[arm].values()))), *shares, difference, reward]
        lines.append(f"| {' | '.join(cells)} |")
    sets = len(rewards)
    return "\n".join([*lines, "", f"Correlation of reward and accuracy over {sets} trace sets: {r.signed}", ""])


def draw(path: Path, pooled: dict, sets: list[dict], r: Estimate) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), constrained_layout=True)
    estimates = [bootstrap(list(values.values())) for values in pooled.values()]
    spread = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    left.bar(["base", "novice", "early", "warm-up", "trained", "worked"], [e.mean for e in estimates], color="#1f6f8b")
    left.errorbar(range(len(estimates)), [e.mean for e in estimates], yerr=spread, fmt="none", ecolor="#333", capsize=4)
    left.set(title="Students by what they learned from", ylabel="held-out accuracy")
    for arm, colour in zip(TEACHERS, ("#c9822b", "#8a8f98", "#1f6f8b"), strict=True):
        mine = [entry for entry in sets if entry["set"] == arm]
        right.scatter([e["reward"] for e in mine], [e["accuracy"] for e in mine], color=colour, label=ARMS[arm][11:])
    right.set(title=f"Trace sets, r = {r.mean:.2f}", xlabel="mean reward of the traces", ylabel="student's accuracy")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
