"""Devices by their free memory, figures over a minute, and curves of steps, by hand."""

from types import SimpleNamespace

import pytest

pytest.importorskip("sqlalchemy")

from rlt.reports.lines import POINTS, curve, thinned  # noqa: E402
from rlt.serving.rates import Marks  # noqa: E402
from rlt.serving.sessions.curves import by_step  # noqa: E402
from rlt.workers.accelerators import accelerators, most_free, read_accelerators  # noqa: E402

SMI = [
    "0, GPU-aaa, NVIDIA H200, 10000, 143771, 97",
    "1, GPU-bbb, NVIDIA H200, 500, 143771, 0",
    "2, GPU-ccc, NVIDIA H200, 90000, 143771, [N/A]",
    "Failed to initialize NVML",
]


def test_devices_are_read_and_the_one_with_the_most_free_memory_is_taken():
    found = read_accelerators(SMI)
    assert [each.free_bytes // 2**20 for each in found] == [133771, 143271, 53771]
    assert [each.busy for each in found] == [0.97, 0.0, 0.0]
    assert most_free(found) == "GPU-bbb"
    assert most_free(found, avoid="GPU-bbb") == "GPU-aaa"
    assert most_free(found[1:2], avoid="GPU-bbb") == "GPU-bbb"
    assert most_free([]) is None


def test_a_program_that_says_what_nvidia_smi_says_is_asked_for_visible_devices(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(SMI) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for visible, seen in ((None, "012"), ("2,0", "02"), ("GPU-b", "1"), ("MIG-x", ""), ("", "")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert "".join(each.index for each in accelerators()) == seen


def test_rates_are_those_of_the_last_minute():
    marks = Marks()
    marks.mark(0, {}, {})
    assert marks.now(10, {"sample": 50}, {"sample": 5.0}).tokens == {"sample": 5.0}
    for time_s in range(20, 110, 10):
        rates = marks.now(time_s, {"sample": 50, "forward": time_s}, {"sample": 5.0, "forward": time_s / 2})
    assert rates.tokens == {"sample": 0.0, "forward": 1.0}
    assert rates.busy == {"sample": 0.0, "forward": 0.5}
    assert len(marks.marks) < 9


def test_passes_before_a_step_are_one_batch_of_its_curves():
    rows = [
        SimpleNamespace(kind=kind, figures=figures)
        for kind, figures in (
            ("forward_backward", {"loss:sum": 6.0, "tokens": 3, "kl:mean": 1.0, "ratio:max": 2.0}),
            ("forward_backward", {"loss:sum": 2.0, "tokens": 1, "kl:mean": 3.0, "ratio:max": 1.5}),
            ("optim_step", {"grad_norm": 0.5}),
            ("optim_step", {"grad_norm": 0.0}),
            ("forward_backward", {"loss:sum": 9.0, "tokens": 3}),
        )
    ]
    assert by_step(rows) == {
        "loss per token": [(1, 2.0)],
        "kl": [(1, 2.0)],
        "ratio": [(1, 2.0)],
        "grad_norm": [(1, 0.5), (2, 0.0)],
    }


def test_a_curve_is_thinned_to_means_and_names_are_escaped():
    points = [(step, float(step % 2)) for step in range(1, 4 * POINTS + 1)]
    assert thinned(points)[0] == (4, 0.5)
    assert len(thinned(points)) == POINTS
    drawn = curve("<b>", [(1, 2.0)])
    assert "&lt;b&gt;" in drawn
    assert "<b>2<" in drawn.replace("<b>2</b>", "<b>2<")
