"""Token by token, what a reward saw: for a page that colours the text with it."""

import json

from rlt.estimates import best_median_worst
from rlt.rewards.teacher import Reading, Scored


def token_columns(tokenizer, readings: list[Reading], scored: list[Scored]) -> list[str | None]:
    """JSON of `token_scores` for the best, the median and the worst of them, None for the others: few are looked at."""
    columns: list[str | None] = [None] * len(scored)
    for place in best_median_worst([one.reward for one in scored]):
        columns[place] = json.dumps(token_scores(tokenizer, readings[place], scored[place]))
    return columns


def token_scores(tokenizer, reading: Reading, scored: Scored) -> dict[str, list[list]]:
    """`explanation`: [text, log p_student, log p_teacher - log p_student] of each piece; `solution`: the first two, of
    each token.

    Log-probs in nats, at the temperatures of the reward; tokens that straddle a tag are in neither.

    Args:
        tokenizer: the student's.
    """
    student, teacher = ([round(value, 4) for value in values.tolist()] for values in scored.log_probs)
    counted, begin, pieces = reading.student_counted, 0, []
    sizes = reading.explanation.right_sizes + [1] * len(reading.student.spans["solution"])
    for size in sizes:
        pieces.append([reading.student.ids[index] for index in counted[begin : begin + size]])
        begin += size
    texts, split = tokenizer.batch_decode(pieces), len(reading.explanation)
    explained = zip(texts[:split], student[:split], teacher, strict=True)
    return {
        "explanation": [[text, ours, round(theirs - ours, 4)] for text, ours, theirs in explained],
        "solution": [[text, ours] for text, ours in zip(texts[split:], student[split:], strict=True)],
    }
