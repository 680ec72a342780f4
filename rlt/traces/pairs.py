"""Preferences from ranked traces: the best of a question against its worst (for arXiv 2305.18290)."""

from pathlib import Path

import numpy as np

from rlt.data.sources import say_dropped
from rlt.errors import Refused
from rlt.runs.folder import ALL_TRACES


def preference_pairs(folder: Path, min_margin: float) -> list[dict]:
    """The pair of each question that has one: its best trace in the format against its worst trace.

    A pair has `question`, `solution`, `chosen` and `rejected`, and `teacher_system_prompt` if its rows have it.

    Args:
        folder: of a collection.
        min_margin: least difference between the rewards of a pair.

    Raises:
        Refused: the folder is not a collection's, or has no such pair.
    """
    import pandas

    if not (folder / ALL_TRACES).is_file():
        raise Refused(f"dataset_id_or_path={folder} holds no {ALL_TRACES}: name the output folder of a collection")
    pairs = []
    table = pandas.read_parquet(folder / ALL_TRACES).sort_values("reward", ascending=False, kind="stable")
    for _, rows in table[np.isfinite(table["reward"])].groupby("question_id", sort=True):
        good, worst = rows[rows["matched"]], rows.iloc[-1]
        if len(good) and good.iloc[0]["reward"] - worst["reward"] >= min_margin:
            best = good.iloc[0]
            asked = ("question", "solution", "teacher_system_prompt")  # the prompt that the traces were sampled with
            shared = {key: best[key] for key in asked if isinstance(best.get(key), str)}
            pairs.append({**shared, "chosen": best["completion"], "rejected": worst["completion"]})
    without = table["question_id"].nunique() - len(pairs)
    say_dropped({f"questions without traces that are min_margin={min_margin} apart": without}, str(folder))
    if not pairs:
        raise Refused(f"dataset_id_or_path={folder}: no question has traces that are min_margin={min_margin} apart")
    return pairs
