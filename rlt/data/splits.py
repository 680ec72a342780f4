"""Held-out questions that are never trained on.

Two questions are the same when they differ in nothing but case and white space.
"""

import random
from collections.abc import Iterable

from rlt.errors import Refused


def normalised(question: str) -> str:
    """A question without case and extra white space: equal for all ways to write it."""
    return " ".join(question.casefold().split())


def questions_of(rows: Iterable[dict]) -> set[str]:
    """The different questions of some rows, normalised."""
    return {normalised(row["question"]) for row in rows}


def hold_out(
    rows: list[dict], eval_size: int, seed: int, learned: frozenset[str] | set[str] = frozenset()
) -> tuple[list[dict], list[dict], int]:
    """Choose `eval_size` questions at random and keep every row that repeats one of them out of training.

    Args:
        rows: each with a `question`.
        eval_size: different questions to hold out.
        seed: of the choice; the same rows and seed give the same split.
        learned: normalised questions that the model was trained on before, chosen where there are no others.

    Returns:
        training rows in their order, evaluation rows (one per question), and how many rows are in neither because
        they repeat an evaluation question.

    Raises:
        Refused: there are fewer different questions than asked for, or none would be left to train on.
    """
    questions = [normalised(row["question"]) for row in rows]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: questions[index] in learned)  # stable
    chosen: dict[str, dict] = {}
    for index in order:
        if len(chosen) == eval_size:
            break
        chosen.setdefault(questions[index], rows[index])
    train = [row for row, question in zip(rows, questions, strict=True) if question not in chosen]
    if len(chosen) < eval_size or not train:
        raise Refused(f"eval_size={eval_size} leaves nothing of {len(set(questions))} questions to train on")
    return train, list(chosen.values()), len(rows) - len(train) - len(chosen)


def check_disjoint(train: Iterable[dict], evaluation: list[dict]) -> None:
    """Refuse evaluation questions that are trained on.

    Raises:
        Refused: how many evaluation rows are among the training rows, and the first of them.
    """
    seen = questions_of(train)
    shared = [row["question"] for row in evaluation if normalised(row["question"]) in seen]
    if shared:
        raise Refused(f"{len(shared)} evaluation rows are among the training rows, the first: {shared[0][:80]!r}")
