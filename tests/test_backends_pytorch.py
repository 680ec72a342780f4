"""The backend of one process: sums that do not depend on passes, calls that leave nothing behind, states that go on."""

import asyncio
import math
from functools import partial

import pytest
import torch
from test_logprobs import VOCABULARY, llama

from backends import AdamParams, Datum, PyTorchTrainingBackend, TrainingBackend, additive
from rlt.errors import Refused
from rlt.survival.oom import NoMemoryLeft

LIMIT_S = 60
PARAMS = AdamParams(learning_rate=1e-2)


def tiny(dtype=torch.float32, **options):
    return llama(max_position_embeddings=64, **options).to(dtype)


def backend_of(tmp_path, model=None, **options) -> PyTorchTrainingBackend:
    model = model or tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    return PyTorchTrainingBackend(model, optimizer, "cross_entropy", tmp_path, "cpu", **options)


def data(count: int = 5, seed: int = 0, k: int | None = None) -> list[Datum]:
    """Sequences that begin alike, of several lengths, each with the inputs of every loss."""
    own = torch.Generator().manual_seed(seed)  # the global one is not a thread's own
    draw, normal = partial(torch.rand, generator=own), partial(torch.randn, generator=own)
    tokens_of = partial(torch.randint, VOCABULARY, generator=own)
    found = []
    for number in range(count):
        size = 6 + number % 4
        tokens = [3, 1, 4, *tokens_of(size=(size - 3,)).tolist()]
        shape = (size,) if k is None else (size, k)
        inputs = {"target_tokens": tokens_of(size=shape), "weights": draw(shape)}
        if k is None:
            sampled = torch.tensor([0.0] * 2 + [1.0] * (size - 2))
            inputs |= {"logprobs": -3 * draw(size) * sampled, "advantages": normal(size) * sampled}
            inputs |= {"sequence_ratio_mask": sampled, "ref_logprobs": -3 * draw(size)}
        found.append(Datum(tokens, inputs))
    return found


def gradients(backend) -> list[torch.Tensor]:
    return [p.grad.clone() for p in backend.model.parameters()]


def weights(backend) -> list[torch.Tensor]:
    return [p.detach().clone() for p in backend.model.parameters()]


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def by_hand(model, batch: list[Datum]) -> torch.Tensor:
    """Weighted cross-entropy, one sequence at a time."""
    total = 0.0
    for datum in batch:
        rows = torch.log_softmax(model(torch.tensor([datum.tokens])).logits[0].double(), -1)
        targets = datum.loss_inputs["target_tokens"].view(len(datum.tokens), -1)
        picked = rows.gather(-1, targets).view(datum.loss_inputs["target_tokens"].shape)
        total = total - (datum.loss_inputs["weights"] * picked).sum()
    return total


def test_it_is_a_training_backend(tmp_path):
    assert isinstance(backend_of(tmp_path), TrainingBackend)


def test_it_is_awaited_in_a_loop_and_waited_for_elsewhere(tmp_path):
    backend = backend_of(tmp_path)

    async def steps():
        first = await backend.forward_backward(data()).result()
        await backend.optim_step(PARAMS).result()
        return first, await backend.forward(data())

    first, second = asyncio.run(steps())
    third = backend.forward_backward(data()).result(LIMIT_S)
    assert first.metrics["loss:sum"] > second.metrics["loss:sum"]
    assert second.metrics["loss:sum"] == pytest.approx(third.metrics["loss:sum"])


@pytest.mark.parametrize("k", [None, 3])
def test_loss_log_probs_and_gradients_are_those_of_plain_operations(tmp_path, k):
    backend, batch = backend_of(tmp_path, tiny(torch.double)), data(k=k)
    output = backend.forward_backward(batch).result(LIMIT_S)
    found = gradients(backend)
    backend.model.zero_grad()
    loss = by_hand(backend.model, batch)
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), abs=1e-9)
    for a, b in zip(found, gradients(backend), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for datum, values, parts in zip(batch, output.logprobs, output.elementwise_loss, strict=True):
        assert values.shape == datum.loss_inputs["target_tokens"].shape and values.dtype == torch.float32
        torch.testing.assert_close(parts, -datum.loss_inputs["weights"] * values)
    assert output.metrics["tokens:sum"] == sum(datum.loss_inputs["weights"].numel() for datum in batch)


def mean_of_all(data_, log_probs):
    """A loss that is no sum over data, with a figure of its own."""
    values = torch.cat([values.flatten() for values in log_probs])
    return values.square().mean().sqrt(), {"spread:mean": values.std().item()}


LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "grpo", "dpo", mean_of_all]


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss: loss if isinstance(loss, str) else loss.__name__)
def test_passes_change_no_sum(tmp_path, loss_fn):
    """One pass of all, one pass of each; of both together with targets of other widths, in the same call."""
    found = []
    for budget in (1000, 1):
        backend = backend_of(tmp_path, tiny(torch.double), token_budget=budget)
        read = backend.forward(data(6), loss_fn).result(LIMIT_S)
        output = backend.forward_backward(data(6), loss_fn).result(LIMIT_S)
        assert read.metrics == pytest.approx(output.metrics)
        assert all(torch.equal(a, b) for a, b in zip(read.logprobs, output.logprobs, strict=True))
        found.append((output, gradients(backend)))
    (one, its), (other, others) = found
    assert one.metrics == pytest.approx(other.metrics)
    for a, b in zip([*its, *one.logprobs], [*others, *other.logprobs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_calls_until_a_step(tmp_path):
    once, twice = backend_of(tmp_path, tiny(torch.double)), backend_of(tmp_path, tiny(torch.double))
    once.forward_backward(data(5)).result(LIMIT_S)
    for part in (data(5)[:2], data(5)[2:]):
        twice.forward_backward(part).result(LIMIT_S)
    for a, b in zip(gradients(once), gradients(twice), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    step = once.optim_step(PARAMS).result(LIMIT_S)
    assert step.weight_version == 1 and step.learning_rate == 1e-2
    assert all(p.grad is None for p in once.model.parameters())


def test_forward_touches_neither_gradients_nor_weights_nor_the_optimizer(tmp_path):
    backend = backend_of(tmp_path)
    backend.forward_backward(data()).result(LIMIT_S)
    backend.optim_step().result(LIMIT_S)
    backend.forward_backward(data()).result(LIMIT_S)
    before = [gradients(backend), weights(backend), *map(list, map(dict.values, backend.optimizer.state.values()))]
    before = [[value.clone() for value in values] for values in before]
    backend.forward(data(seed=1), "ppo").result(LIMIT_S)
    after = [gradients(backend), weights(backend), *map(list, map(dict.values, backend.optimizer.state.values()))]
    assert all(all_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not backend.model.training


def test_a_step_is_adamws_with_the_numbers_that_come_with_it(tmp_path):
    backend, other = backend_of(tmp_path), tiny()
    plain = torch.optim.AdamW(other.parameters(), lr=1)
    for rate, clip in ((1e-2, 0.0), (3e-3, 0.5)):
        backend.forward_backward(data()).result(LIMIT_S)
        for mine, its in zip(other.parameters(), backend.model.parameters(), strict=True):
            mine.grad = its.grad.clone()
        params = AdamParams(rate, 0.8, 0.9, 1e-8, 0.1, clip)
        step = backend.optim_step(params).result(LIMIT_S)
        for group in plain.param_groups:
            group |= {"lr": rate, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), clip or math.inf)
        plain.step()
        assert step.grad_norm == pytest.approx(norm.item())
        assert all_equal(weights(backend), [p.detach() for p in other.parameters()])


def test_a_step_without_gradients_does_nothing_and_succeeds(tmp_path):
    backend = backend_of(tmp_path)
    before = weights(backend)
    step = backend.optim_step(AdamParams(weight_decay=0.5)).result(LIMIT_S)
    assert (step.grad_norm, step.weight_version) == (0.0, 0)
    assert all_equal(before, weights(backend)) and not backend.optimizer.state


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (AdamParams(learning_rate=math.nan), "learning_rate=nan"),
        (AdamParams(beta2=1.0), "beta2=1.0: a number from 0 to below 1"),
        (AdamParams(grad_clip_norm=-1), "grad_clip_norm=-1: a number of 0 or more"),
    ],
)
def test_steps_with_numbers_that_cannot_be_are_refused_and_keep_the_gradients(tmp_path, params, said):
    backend = backend_of(tmp_path)
    backend.forward_backward(data()).result(LIMIT_S)
    before = gradients(backend)
    with pytest.raises(Refused, match=said):
        backend.optim_step(params).result(LIMIT_S)
    assert all_equal(before, gradients(backend))


def test_an_optimizer_of_another_kind_steps_with_its_own_numbers(tmp_path):
    model = tiny()
    backend = PyTorchTrainingBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=tmp_path)
    backend.forward_backward(data()).result(LIMIT_S)
    with pytest.raises(Refused, match="SGD takes no AdamParams"):
        backend.optim_step(PARAMS).result(LIMIT_S)
    assert backend.optim_step().result(LIMIT_S).learning_rate == 0.1


# What fails leaves nothing behind


def fails_late(data_, log_probs):
    """Raises in the second pass, when the first is in the gradients."""
    if data_[0].loss_inputs["weights"].max() > 1:
        raise KeyError("mine")
    return -torch.cat(log_probs).sum()


additive(fails_late)


def test_a_call_that_fails_amid_its_passes_adds_nothing(tmp_path):
    good, bad = data(3), data(4, seed=1)
    bad[0].loss_inputs["weights"][0] = 7.0
    disturbed, undisturbed = (backend_of(tmp_path, token_budget=1) for _ in range(2))
    for backend in (disturbed, undisturbed):
        backend.forward_backward(good).result(LIMIT_S)
    with pytest.raises(KeyError, match="mine"):
        disturbed.forward_backward(bad, fails_late).result(LIMIT_S)
    with pytest.raises(Refused, match="'nothing' is not known"):
        disturbed.forward_backward(bad, "nothing").result(LIMIT_S)
    for backend in (disturbed, undisturbed):
        backend.forward_backward(data(2, seed=2)).result(LIMIT_S)
        backend.optim_step(PARAMS).result(LIMIT_S)
    assert all_equal(weights(disturbed), weights(undisturbed))


def test_gradients_that_a_failed_call_took_with_it_are_there_for_the_step(tmp_path):
    disturbed, undisturbed = (backend_of(tmp_path, token_budget=1) for _ in range(2))
    for backend in (disturbed, undisturbed):
        backend.forward_backward(data(3)).result(LIMIT_S)
    with pytest.raises(Refused, match="no gradients"):
        disturbed.forward_backward(data(2), lambda data_, log_probs: torch.zeros(())).result(LIMIT_S)
    with pytest.raises(Refused, match="is nan: nothing was added"):
        disturbed.forward_backward(data(2), lambda d, log_probs: log_probs[0].sum() * math.nan).result(LIMIT_S)
    for backend in (disturbed, undisturbed):
        backend.optim_step(PARAMS).result(LIMIT_S)
    assert all_equal(weights(disturbed), weights(undisturbed))


def test_gradients_that_are_not_finite_are_dropped_and_change_nothing(tmp_path):
    backend = backend_of(tmp_path)
    before = weights(backend)

    def steep(data_, log_probs):
        return (log_probs[0][0] * 0).abs().sqrt()

    backend.forward_backward(data(1), steep).result(LIMIT_S)
    with pytest.raises(Refused, match="norm of the gradients is nan: they were dropped"):
        backend.optim_step(PARAMS).result(LIMIT_S)
    assert all_equal(before, weights(backend))
    assert backend.optim_step(PARAMS).result(LIMIT_S).grad_norm == 0.0


def run_out(monkeypatch, model, times: list[int]) -> list[int]:
    """The trunk's passes of these numbers run out of memory, on the way back if the number is negative; their sizes."""
    sizes, trunk = [], type(model.model).forward

    def forward(self, *args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        number = len(sizes)
        if number in times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found = trunk(self, *args, **kwargs)
        if -number in times and found.last_hidden_state.requires_grad:
            found.last_hidden_state.register_hook(
                lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of"))
            )
        return found

    monkeypatch.setattr(type(model.model), "forward", forward)
    return sizes


@pytest.mark.parametrize("times", [[1], [-1], [2], [-2], [2, -4]], ids=str)
@pytest.mark.parametrize("loss_fn", ["cross_entropy", mean_of_all])
def test_what_runs_out_of_memory_is_repeated_in_smaller_passes(tmp_path, monkeypatch, times, loss_fn):
    """In the first call of a step, or the second, with the first one's gradients in; once, or twice."""
    undisturbed = backend_of(tmp_path, tiny(torch.double))
    disturbed = backend_of(tmp_path, tiny(torch.double))
    for part in (data(3), data(12, seed=1)):
        undisturbed.forward_backward(part, loss_fn).result(LIMIT_S)
    sizes = run_out(monkeypatch, disturbed.model, times)
    for part in (data(3), data(12, seed=1)):
        output = disturbed.forward_backward(part, loss_fn).result(LIMIT_S)
    assert len(sizes) > 2 and max(sizes[-2:]) < max(sizes)
    assert math.isfinite(output.metrics["loss:sum"])
    for a, b in zip(gradients(disturbed), gradients(undisturbed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_sequence_that_does_not_fit_ends_in_one_line_and_adds_nothing(tmp_path, monkeypatch):
    backend = backend_of(tmp_path)
    backend.forward_backward(data(1)).result(LIMIT_S)
    before = gradients(backend)
    with monkeypatch.context() as patch:
        run_out(patch, backend.model, list(range(1, 50)))
        with pytest.raises(NoMemoryLeft, match="one sequence of 6 tokens in a pass .* give shorter sequences"):
            backend.forward_backward(data(1, seed=1)).result(LIMIT_S)
    backend.forward_backward([Datum([1], {"target_tokens": torch.tensor([1]), "weights": torch.zeros(1)})]).result(9)
    assert all_equal(before, gradients(backend))
