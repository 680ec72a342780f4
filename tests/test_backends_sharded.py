"""Two ranks that share a model do what one process does with the whole batch: copies, FSDP2, ZeRO-1 to -3, on gloo."""

import os
import socket

import pytest
import torch
from conftest import spawn_ranks
from test_backends_pytorch import LIMIT_S, LOSSES, backend_of, data, tiny

from backends import (
    AdamParams,
    PyTorchTrainingBackend,
    ShardedTrainingBackend,
    additive,
    create_adamw_optimizer,
    create_cross_entropy_loss,
    create_deepspeed_backend,
    create_fsdp_backend,
    create_parallel_backend,
    load_hf_model,
)
from backends.rank_passes import shares
from rlt.errors import Refused

CLIPPED = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
BUDGET = 12  # tokens of a pass: several on each rank, and not as many on both
VOCABULARY = 50
LONGEST = 9  # tokens of the fourth of `data`


def test_shares_are_of_neighbours_with_about_as_many_tokens():
    assert shares([4, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4]]
    assert shares([1, 1, 1, 1, 4, 4], 2, together=2) == [[0, 1, 2, 3], [4, 5]]
    assert shares([9], 3) == [[], [0], []]


def begin(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def ranks_of(kind: str, folder, model=None) -> ShardedTrainingBackend:
    """By hand, around a model that exists."""
    from backends.ranks import Copies, FullyShardedData, Zero, join

    place, model = join("cpu", LIMIT_S), model or tiny()
    if kind.startswith("zero"):
        optimizer = create_adamw_optimizer(model)
        ranks = Zero(model, optimizer, int(kind[-1]), torch.float32)
    else:
        ranks = FullyShardedData(model, place) if kind == "fsdp" else Copies(model)
        optimizer = create_adamw_optimizer(ranks.model)
    return ShardedTrainingBackend(ranks, optimizer, "cross_entropy", folder, place, token_budget=BUDGET)


def plain() -> dict[str, torch.Tensor]:
    own = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (3, 7), generator=own)
    return {"input_ids": ids, "labels": ids}


def mean_loss(outputs, labels):
    """No sum over rows, with a figure of its own."""
    picked = outputs.logits.log_softmax(-1).gather(-1, labels[..., None])
    return picked.mean().neg(), {"low:min": picked.min().item()}


def squares(data_, log_probs):
    return sum(values.square().sum() for values in log_probs)


def assert_same_outputs(one, other) -> None:
    assert other.metrics == pytest.approx(one.metrics, rel=1e-5, abs=1e-5)
    for kind in ("logprobs", "elementwise_loss"):
        assert len(getattr(one, kind)) == len(getattr(other, kind))
        for a, b in zip(getattr(one, kind), getattr(other, kind), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_same_weights(one, other, atol: float = 1e-5) -> None:
    own, others = one.get_weights().result(LIMIT_S), other.get_weights().result(LIMIT_S)
    assert own.keys() == others.keys()
    for name, value in own.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=atol)


def both(one, other, batch, loss_fn=None):
    found = [backend.forward_backward(batch, loss_fn).result(LIMIT_S) for backend in (one, other)]
    assert_same_outputs(*found)
    read = other.forward(batch, loss_fn).result(LIMIT_S)  # amid accumulation: it changes nothing
    assert read.metrics == pytest.approx(found[0].metrics, rel=1e-5, abs=1e-5)


def step_both(one, other, atol: float = 1e-5) -> None:
    own, others = (backend.optim_step(CLIPPED).result(LIMIT_S) for backend in (one, other))
    assert others.grad_norm == pytest.approx(own.grad_norm, rel=1e-5) and own.grad_norm > 1
    assert (own.weight_version, own.learning_rate) == (others.weight_version, others.learning_rate)
    assert_same_weights(one, other, atol)


def every_loss_adds_up_until_a_step(one, other) -> None:
    additive(squares)
    for loss_fn in (*LOSSES, squares):
        both(one, other, data(6), loss_fn)
    step_both(one, other)
    both(one, other, data(1, k=3))  # one rank has nothing to read
    both(one, other, data(2), "dpo")
    step_both(one, other)
    for loss_fn in ("causal_lm", mean_loss):
        both(one, other, plain(), loss_fn)
    step_both(one, other)


def odd(data_, log_probs):
    """Fails on the rank that reads the last datum."""
    if any(len(datum.tokens) == LONGEST for datum in data_):
        raise ValueError("an odd datum")
    return squares(data_, log_probs)


def what_fails_leaves_nothing(one, other, rank: int) -> None:
    additive(odd)
    for loss_fn, batch, said in (
        (lambda d, lp: lp[0].sum() * float("nan"), data(3), "is nan: nothing was added"),
        (odd, data(4), "an odd datum"),
        ("ppo", [*data(1), data(1, k=2)[0]], "datum 1"),
        (None, data(3, seed=rank), "different batches: give each of them the whole batch"),
    ):
        for backend in (one, other):
            backend.forward_backward(data(2)).result(LIMIT_S)
        with pytest.raises((Refused, ValueError, RuntimeError), match=said):
            other.forward_backward(batch, loss_fn).result(LIMIT_S)
    step_both(one, other)


def states_go_from_one_to_the_other(one, other, kind: str, folder) -> None:
    other.save_state("early").result(LIMIT_S)
    both(one, other, data(5))
    step_both(one, other)
    other.save_state("theirs").result(LIMIT_S)
    fresh = ranks_of(kind, folder)
    plain_one = backend_of(folder)
    for path in ("theirs", "early"):
        assert plain_one.load_state(path).result(LIMIT_S) == fresh.load_state(path).result(LIMIT_S)
        both(plain_one, fresh, data(5, seed=8))
        step_both(plain_one, fresh)
    with pytest.raises((Refused, RuntimeError), match="theirs exists"):
        other.save_state("theirs").result(LIMIT_S)
    with pytest.raises(Refused, match="no saved state"):
        other.load_state("nothing").result(LIMIT_S)
    fresh.load_state("theirs", with_optimizer=False).result(LIMIT_S)
    plain_one.load_state("theirs", with_optimizer=False).result(LIMIT_S)
    both(plain_one, fresh, data(5, seed=9))
    step_both(plain_one, fresh)
    name, value = next(iter(one.get_weights().result(LIMIT_S).items()))
    for backend in (plain_one, fresh):
        backend.load_weights({name: value * 0.5}).result(LIMIT_S)
        backend.forward_backward(data(4)).result(LIMIT_S)
    step_both(plain_one, fresh)


def train_one_and_two(rank: int, kind: str, folder: str, port: int) -> None:
    begin(rank, port)
    one = PyTorchTrainingBackend(model := tiny(), create_adamw_optimizer(model), "cross_entropy", folder, "cpu")
    other = ranks_of(kind, folder)
    every_loss_adds_up_until_a_step(one, other)
    states_go_from_one_to_the_other(one, other, kind, folder)
    what_fails_leaves_nothing(one, other, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


KINDS = ["fsdp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("copies", "zero1", "zero2", "zero3"))]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_process_does(tmp_path, kind):
    spawn_ranks(train_one_and_two, (kind, str(tmp_path), free_port()))


CREATORS = {"fsdp": create_fsdp_backend, "zero3": create_deepspeed_backend, "copies": create_parallel_backend}


def create_and_by_hand(rank: int, kind: str, model: str, folder: str, port: int) -> None:
    begin(rank, port)
    created = CREATORS[kind](model, folder, learning_rate=1e-2, token_budget=BUDGET)
    by_hand = ranks_of(kind, folder, load_hf_model(model, "float32", "cpu"))
    by_hand.loss_fn = create_cross_entropy_loss()
    found = []
    for backend in (created, by_hand):
        losses = [backend.forward_backward(b).result(LIMIT_S).metrics["loss:sum"] for b in (data(5), plain())]
        step = backend.optim_step(AdamParams(learning_rate=1e-2)).result(LIMIT_S)
        found.append((losses, step, backend.get_weights().result(LIMIT_S)))
    (*own, weights), (*others, their_weights) = found
    assert own == others and all(torch.equal(weights[name], their_weights[name]) for name in weights)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CREATORS)
def test_what_one_call_does_the_tier_below_does_by_hand_with_the_same_numbers(tmp_path, tiny_teacher, kind):
    spawn_ranks(create_and_by_hand, (kind, tiny_teacher, str(tmp_path), free_port()))


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(Refused, match="zero_stage=4: 1, 2, 3 would do"):
        create_deepspeed_backend("embedded/smollm2-135m-instruct", "runs/a", zero_stage=4)
