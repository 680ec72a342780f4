"""Draws `a_step.svg`, the picture of a training step in internals.md: `.venv/bin/python docs/draw_a_step.py [FILE]`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

INK, QUIET = "#222222", "#6b6b6b"
FLOW, KEPT, OUTSIDE = "#dcebf1", "#f6e7cf", "#e8e8e4"  # our step, what the batch keeps, TRL's own part
WIDTH, HEIGHT = 2.35, 0.95
COLUMNS = [0.0, 2.75, 5.5, 8.25, 11.0]
TOP, MIDDLE, BOTTOM = 5.2, 2.9, 0.6
# (title, words below it, column, row, colour)
BOXES = {
    "prompts": ("prompts", "question and solution\nrlt/prompts", 0, TOP, FLOW),
    "completions": ("completions", "and their sampling log-probs\nrlt/generation", 1, TOP, FLOW),
    "policy": ("pass of the policy", "no gradients\nrlt/logprobs", 2, TOP, FLOW),
    "reference": ("pass of the reference", "for the KL of GRPO\nrlt/logprobs", 3, TOP, FLOW),
    "student": ("pass of the student", "only if it is not\nthe reference", 4, TOP, FLOW),
    "readings": ("both texts", "teacher's and student's,\ntokenised once", 1, MIDDLE, KEPT),
    "teacher_kept": ("the teacher's log-probs", "of the explanation", 2, MIDDLE, KEPT),
    "student_kept": ("the student's log-probs", "of explanation and solution", 3.5, MIDDLE, KEPT),
    "reward": ("reward", "r_SS − λ r_KL + match\nrlt/rewards", 4, BOTTOM, FLOW),
    "advantages": ("advantages", "in a question's group\nTRL", 3, BOTTOM, OUTSIDE),
    "update": ("loss and update", "backward, optimizer\nTRL, trainers", 2, BOTTOM, OUTSIDE),
    "weights": ("new weights", "to the engine\nrlt/generation", 1, BOTTOM, FLOW),
}


def place(column: float) -> float:
    whole = int(column)
    return COLUMNS[whole] + (column - whole) * (COLUMNS[1] - COLUMNS[0])


def draw_boxes(axes) -> None:
    for title, words, column, row, colour in BOXES.values():
        left = place(column)
        outline = FancyBboxPatch((left, row), WIDTH, HEIGHT, boxstyle="round,pad=0.02", fc=colour, ec=INK, lw=0.8)
        axes.add_patch(outline)
        height = row + (HEIGHT * 0.74 if words else HEIGHT / 2)
        axes.text(left + WIDTH / 2, height, title, ha="center", va="center", size=9.5, weight="bold", color=INK)
        axes.text(left + WIDTH / 2, row + HEIGHT * 0.3, words, ha="center", va="center", size=8.5, color=QUIET)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], words: str = "", dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.0, "ls": "--" if dashed else "-", "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    if words:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        axes.text(
            *middle, words, ha="center", va="center", size=8, color=INK, bbox={"fc": "white", "ec": "none", "pad": 1.5}
        )


def draw_arrows(axes) -> None:
    def left(name: str) -> tuple[float, float]:
        return place(BOXES[name][2]), BOXES[name][3] + HEIGHT / 2

    def right(name: str) -> tuple[float, float]:
        return left(name)[0] + WIDTH, left(name)[1]

    def above(name: str, share: float = 0.5) -> tuple[float, float]:
        return left(name)[0] + WIDTH * share, BOXES[name][3] + HEIGHT

    def below(name: str, share: float = 0.5) -> tuple[float, float]:
        return left(name)[0] + WIDTH * share, BOXES[name][3]

    for first, second in (("prompts", "completions"), ("completions", "policy"), ("policy", "reference")):
        arrow(axes, right(first), left(second))
    arrow(axes, right("reference"), left("student"))
    arrow(axes, below("completions"), above("readings"))
    arrow(axes, below("policy"), above("teacher_kept"), "read on the side")
    arrow(axes, below("reference"), above("student_kept", 0.2), "the student is\nthe reference")
    arrow(axes, below("student", 0.7), above("student_kept", 0.9), "it is not")
    arrow(axes, right("readings"), left("teacher_kept"), dashed=True)
    arrow(axes, below("teacher_kept", 0.8), above("reward", 0.1))
    arrow(axes, below("student_kept", 0.7), above("reward", 0.5))
    for first, second in (("reward", "advantages"), ("advantages", "update"), ("update", "weights")):
        arrow(axes, left(first), right(second))
    corner = (COLUMNS[0] + WIDTH / 2, BOTTOM + HEIGHT / 2)
    axes.plot([left("weights")[0], corner[0]], [corner[1]] * 2, color=INK, lw=1.0)
    arrow(axes, corner, below("prompts"), "the next step")


def draw(file: Path) -> None:
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "a step", "font.family": "sans-serif"}
    figure, axes = pyplot.subplots(figsize=(13.5, 6.6))
    draw_boxes(axes)
    draw_arrows(axes)
    legend = (
        ("a phase of the step", FLOW),
        ("kept between two calls of TRL, for the reward", KEPT),
        ("done by TRL", OUTSIDE),
    )
    for left, (words, colour) in zip((0.0, 2.75, 8.25), legend, strict=True):
        axes.add_patch(FancyBboxPatch((left, -0.35), 0.3, 0.22, boxstyle="round,pad=0.02", fc=colour, ec=INK, lw=0.6))
        axes.text(left + 0.45, -0.24, words, va="center", size=9, color=INK)
    axes.set(xlim=(-0.2, 13.6), ylim=(-0.6, 6.4))
    axes.set_axis_off()
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("a_step.svg"))
