"""Which figure of a run's logs is drawn in which panel, and how."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from rlt.reports.curves import COLORS, curves, draw_curves

PANELS_OF = {
    "reward": [0],
    "eval/reward": [0],
    "kl": [1],
    "completions/mean_length": [2],
    "eval/length": [2],
    "num_tokens": [],
}


def logged(folder, **metrics):
    """The folder of a run with these values at steps 1, 2 and so on."""
    steps = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    lines = [json.dumps({"step": number, **step}) + "\n" for number, step in enumerate(steps, start=1)]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def picture(folder, **metrics):
    """The pixels that are drawn of two steps, in three panels side by side."""
    assert draw_curves({"run": logged(folder, **metrics)}, folder / "curves.png")
    return np.split(imread(folder / "curves.png"), 3, axis=1)


def lines_of(figure) -> dict[str, dict[str, list]]:
    """By the titles of panels, then by the names of lines."""
    drawn = [axis for axis in figure.axes if axis.axison]
    return {a.get_title(): {line.get_label(): line.get_ydata().tolist() for line in a.get_lines()} for a in drawn}


@pytest.mark.parametrize(("metric", "panels"), PANELS_OF.items())
def test_the_plot_shows_each_metric_in_its_panel(metric, panels, tmp_path):
    assert not draw_curves({"run": tmp_path}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    rising = dict.fromkeys(PANELS_OF, (1.0, 2.0))
    # Held-out questions lie above the training batch, so that neither line hides the other.
    rising |= {"eval/reward": (1.2, 1.8), "eval/length": (1.2, 1.8)}
    before, again = picture(tmp_path, **rising), picture(tmp_path, **rising)
    after = picture(tmp_path, **{**rising, metric: rising[metric][::-1]})  # within the same axes
    assert before[0].shape == (297, 440, 4)  # 4 x 2.7 inches at 110 dots
    assert [np.array_equal(*pair) for pair in zip(before, again, strict=True)] == [True] * 3
    assert [place for place in range(3) if not np.array_equal(before[place], after[place])] == panels


def test_held_out_questions_lie_over_the_training_batch_of_a_single_run(tmp_path):
    figure = curves({"run": logged(tmp_path, reward=(0, 1, 2), **{"eval/reward": (5, None, 6)})})
    assert lines_of(figure) == {"reward": {"training batch": [0, 1, 2], "held-out questions": [5, 6]}}
    (axis,) = figure.axes
    batch, held_out = axis.get_lines()
    assert held_out.get_xdata().tolist() == [1, 3]
    assert (batch.get_color(), batch.get_marker(), held_out.get_color()) == ("#999999", "None", COLORS[0])
    assert held_out.get_marker() == "o" and held_out.get_zorder() >= batch.get_zorder()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["training batch", "held-out questions"]


def test_held_out_questions_without_a_training_batch_have_a_panel_of_their_own(tmp_path):
    figure = curves({"run": logged(tmp_path, **{"eval/reward": (5, 6, 7)})})
    assert list(lines_of(figure)) == ["reward on held-out questions"]


def test_held_out_accuracy_of_one_reward_function_keeps_its_panel(tmp_path):
    keys = {"rewards/answer_reward/mean": (0, 1), "eval/answer_reward": (1, 1)}
    assert list(lines_of(curves({"run": logged(tmp_path, **keys)}))) == ["accuracy on held-out questions"]


def test_several_runs_have_panels_of_a_line_each(tmp_path):
    runs = {name: logged(tmp_path / name, reward=(0, 1), **{"eval/reward": (2, 3)}) for name in ("a", "b")}
    assert lines_of(curves(runs)) == {
        "reward": {"a": [0, 1], "b": [0, 1]},
        "reward on held-out questions": {"a": [2, 3], "b": [2, 3]},
    }
