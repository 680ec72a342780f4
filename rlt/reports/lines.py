"""Small curves drawn as SVG, for pages that are made while somebody waits."""

import html
import math

WIDTH, HEIGHT, EDGE = 260, 90, 6
POINTS = 240  # of a curve; more are put together

Points = list[tuple[int, float]]


def thinned(points: Points) -> Points:
    """Neighbours by their means, until there are few enough to see."""
    share = math.ceil(len(points) / POINTS)
    groups = [points[start : start + share] for start in range(0, len(points), share)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def curve(name: str, points: Points) -> str:
    """A figure with its name, its range and its newest value."""
    steps, values = zip(*(shown := thinned(points)), strict=True)
    least, most = min(values), max(values)
    places = [f"{_place(step, steps[0], steps[-1], WIDTH):.1f},{HEIGHT - y:.1f}" for step, y in (
        (step, _place(value, least, most, HEIGHT)) for step, value in shown)]  # fmt: skip
    line = f'<polyline fill="none" stroke="var(--mark)" stroke-width="1.5" points="{" ".join(places)}"/>'
    last = f'<circle r="2.5" fill="var(--mark)" cx="{places[-1].split(",")[0]}" cy="{places[-1].split(",")[1]}"/>'
    label = html.escape(name)
    said = f"{label}: {number(points[-1][1])} at step {points[-1][0]}, from {number(least)} to {number(most)}"
    return (
        f'<figure><svg role="img" aria-label="{said}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}"><title>{said}</title>{line}{last}</svg>'
        f"<figcaption>{label} <b>{number(points[-1][1])}</b> "
        f'<span class="n">{number(least)} … {number(most)}, step {points[-1][0]}</span></figcaption></figure>'
    )


def _place(value: float, least: float, most: float, size: int) -> float:
    share = (value - least) / (most - least) if most > least else 0.5
    return EDGE + share * (size - 2 * EDGE)


def number(value: float) -> str:
    return f"{value:.4g}"
