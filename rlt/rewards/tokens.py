"""Token by token, what a reward saw: for a page that colours the text with it."""

import json
import math

from rlt.rewards.teacher import Reading, Scored


def best_median_worst(rewards: list[float]) -> list[int]:
    """Their places among the finite rewards, each once; fewer when there are fewer."""
    order = sorted((i for i, reward in enumerate(rewards) if math.isfinite(reward)), key=lambda i: -rewards[i])
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]])) if order else []


def token_columns(tokenizer, readings: list[Reading], scored: list[Scored]) -> list[str | None]:
    """JSON of `token_scores` for the best, the median and the worst of them, None for the others: few are looked at."""
    columns: list[str | None] = [None] * len(scored)
    for place in best_median_worst([one.reward for one in scored]):
        columns[place] = json.dumps(token_scores(tokenizer, readings[place], scored[place]))
    return columns


def token_scores(tokenizer, reading: Reading, scored: Scored) -> dict[str, list[list]]:
    """`explanation`: [text, log p_student, log p_teacher - log p_student] of each token; `solution`: the first two.

    Log-probs in nats, at the temperatures of the reward; tokens that straddle a tag are in neither.
    """
    student, teacher = ([round(value, 4) for value in values.tolist()] for values in scored.log_probs)
    ids = reading.student.ids
    texts = tokenizer.batch_decode([[ids[index]] for index in reading.student_counted])
    split = len(reading.pairs)
    explained = zip(texts[:split], student[:split], teacher, strict=True)
    return {
        "explanation": [[text, ours, round(theirs - ours, 4)] for text, ours, theirs in explained],
        "solution": [[text, ours] for text, ours in zip(texts[split:], student[split:], strict=True)],
    }
