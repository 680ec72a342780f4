"""Plain batches: any module, a loss of its outputs, passes of some rows."""

import pytest
import torch
from test_backends_pytorch import LIMIT_S, backend_of, gradients, run_out, tiny
from test_logprobs import VOCABULARY

from backends import PyTorchTrainingBackend, additive
from rlt.errors import Refused
from rlt.survival.oom import NoMemoryLeft


def batch(rows: int = 5, width: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, width))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_the_loss_is_the_sum_over_labels_in_any_passes(tmp_path):
    found = []
    for budget in (1000, 15, 1):
        backend = backend_of(tmp_path, tiny(torch.double), token_budget=budget)
        output = backend.forward_backward(batch()).result(LIMIT_S)
        assert backend.forward(batch(), "causal_lm").result(LIMIT_S).metrics == pytest.approx(output.metrics)
        found.append((output.metrics, gradients(backend)))
    rows = torch.log_softmax(backend.model(batch()["input_ids"]).logits[:, 1:-1], -1)
    expected = -rows.gather(-1, batch()["labels"][:, 2:, None]).sum().item()
    assert found[0][0] == pytest.approx({"loss:sum": expected, "tokens:sum": 25})
    for metrics, its in found[1:]:
        assert metrics == pytest.approx(found[0][0])
        for a, b in zip(its, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def mean_squares(outputs, labels):
    return (outputs.squeeze(-1) - labels).square().mean()


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, points):
        self.seen += len(points)
        return self.layer(points)


def test_a_model_that_knows_no_tokens_learns_with_its_own_loss(tmp_path):
    torch.manual_seed(0)
    model = Line()
    backend = PyTorchTrainingBackend(
        model, torch.optim.SGD(model.parameters(), lr=0.1), mean_squares, tmp_path, "cpu", token_budget=1
    )
    points = torch.randn(32, 2)
    points_and_labels = {"points": points, "labels": points @ torch.tensor([2.0, -1.0]) + 0.5}
    for _ in range(200):
        backend.forward_backward(points_and_labels).result(LIMIT_S)
        backend.optim_step().result(LIMIT_S)
    assert backend.forward(points_and_labels).result(LIMIT_S).metrics["loss:sum"] < 1e-6
    folder = backend.save_state().result(LIMIT_S)
    model.seen.zero_()
    assert folder.name == "step_0200" and backend.load_state("step_0200").result(LIMIT_S) == 200
    assert model.seen == 32 * 201  # once each time: a mean is never computed of parts
    with pytest.raises(Refused, match="Line is no causal model of transformers: give it a mapping"):
        backend.forward([]).result(LIMIT_S)


def test_a_loss_that_is_marked_additive_is_computed_of_parts(tmp_path):
    seen = []

    @additive
    def squares(outputs, labels):
        seen.append(len(labels))
        return (outputs.squeeze(-1) - labels).square().sum(), {"largest:max": 1.0}

    model = Line()
    backend = PyTorchTrainingBackend(
        model, torch.optim.SGD(model.parameters(), lr=0.1), squares, tmp_path, token_budget=10
    )
    output = backend.forward_backward({"points": torch.randn(32, 2), "labels": torch.randn(32)}).result(LIMIT_S)
    assert seen == [10, 10, 10, 2] and output.metrics["largest:max"] == 1.0


def test_rows_are_halved_where_memory_runs_out(tmp_path, monkeypatch):
    backend, other = backend_of(tmp_path, tiny(torch.double)), backend_of(tmp_path, tiny(torch.double))
    other.forward_backward(batch()).result(LIMIT_S)
    sizes = run_out(monkeypatch, backend.model, [1, -3])
    backend.forward_backward(batch()).result(LIMIT_S)
    assert sizes[0] == 35 and max(sizes[1:3]) <= 17 and set(sizes[3:]) == {7}
    for a, b in zip(gradients(backend), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_parted_ends_in_one_line(tmp_path, monkeypatch):
    backend = backend_of(tmp_path)
    run_out(monkeypatch, backend.model, [1])
    with pytest.raises(NoMemoryLeft, match="out of memory"):
        backend.forward_backward(batch(), lambda outputs, labels: outputs.logits.mean()).result(LIMIT_S)


@pytest.mark.parametrize(
    ("changed", "loss", "said"),
    [
        ({"labels": None}, None, "needs labels"),
        ({"attention_mask": torch.ones(4, 7)}, None, "5 rows of labels and 4 of attention_mask"),
        ({"input_ids": torch.full((5, 7), VOCABULARY)}, None, f"input_ids .* must be from 0 to {VOCABULARY - 1}"),
        ({"labels": torch.full((5, 7), -1)}, None, "labels of a plain batch must be"),
        ({}, "ppo", "'ppo' is not one of a plain batch: causal_lm or a function would do"),
        ({}, lambda outputs, labels: 0.5, "must give a tensor of one number, not float"),
    ],
)
def test_batches_that_cannot_work_are_refused(tmp_path, changed, loss, said):
    with pytest.raises(Refused, match=said):
        backend_of(tmp_path).forward_backward({**batch(), **changed}, loss).result(LIMIT_S)
