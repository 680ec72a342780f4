"""Held-out questions that are never trained on."""

import random


def _normalised(question: str) -> str:
    return " ".join(question.casefold().split())


def hold_out(rows: list[dict], eval_size: int, seed: int) -> tuple[list[dict], list[dict], int]:
    """Choose `eval_size` questions at random and keep every row that repeats one of them out of training.

    Returns:
        training rows, evaluation rows (one per question), and how many training rows were left out as repeats.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen: dict[str, dict] = {}
    for index in order:
        if len(chosen) == eval_size:
            break
        chosen.setdefault(_normalised(rows[index]["question"]), rows[index])
    picked = {id(row) for row in chosen.values()}
    rest = [row for row in rows if id(row) not in picked]
    train = [row for row in rest if _normalised(row["question"]) not in chosen]
    return train, list(chosen.values()), len(rest) - len(train)


def check_disjoint(train: list[dict], evaluation: list[dict]) -> None:
    """Raises:
        ValueError: evaluation questions that are among the training rows.
    """
    seen = {_normalised(row["question"]) for row in train}
    shared = [row["question"] for row in evaluation if _normalised(row["question"]) in seen]
    if shared:
        raise ValueError(f"{len(shared)} evaluation rows are among the training rows, the first: {shared[0][:80]!r}")
