"""What models said of themselves while they were trained, step by step."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, delete, select

from rlt.serving.database import metrics, models

MOST_ROWS = 20_000  # of one model that are drawn, the newest
STEP = "optim_step"
Curves = dict[str, list[tuple[int, float]]]


def forget(connection: Connection, before: float) -> None:
    """Of models that were last used before a time."""
    old = select(models.c.id).where(models.c.used < before)
    connection.execute(delete(metrics).where(metrics.c.model_id.in_(old)))


def curves_of(connection: Connection, model_id: str) -> Curves:
    """Points (step, value) by the name of a figure."""
    theirs = select(metrics).where(metrics.c.model_id == model_id).order_by(metrics.c.seq_id.desc()).limit(MOST_ROWS)
    return by_step(reversed(list(connection.execute(theirs))))


def by_step(rows: Iterable[Row]) -> Curves:
    """The passes before a step are one batch: their figures are put together as their names say."""
    curves, batch, steps = defaultdict(list), [], 0
    for row in rows:
        if row.kind != STEP:
            batch.append(row.figures)
            continue
        steps += 1
        for name, value in {**put_together(batch), **row.figures}.items():
            curves[name].append((steps, value))
        batch = []
    return dict(curves)


def put_together(batch: list[dict[str, Any]]) -> dict[str, float]:
    """`loss:sum` is added up and divided by the tokens; others are means over passes, or what their name ends in."""
    together, tokens = {}, sum(each.get("tokens", 0) for each in batch)
    for name in {name for each in batch for name in each}:
        values = [each[name] for each in batch if name in each]
        what, _, how = name.partition(":")
        if name == "loss:sum" and tokens:
            together["loss per token"] = sum(values) / tokens
        elif how in REDUCED:
            together[what] = REDUCED[how](values)
    return together


REDUCED = {"sum": sum, "min": min, "max": max, "mean": lambda values: sum(values) / len(values)}
