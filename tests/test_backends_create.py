"""The tiers: what one call does, the functions below do by hand in the same numbers, and so does plain PyTorch."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import EMBEDDED, ROOT

from backends import (
    AdamParams,
    Datum,
    PyTorchTrainingBackend,
    compute_device_map_single_gpu,
    create_adamw_optimizer,
    create_backend_with_scheduler,
    create_cross_entropy_loss,
    create_pytorch_backend,
    create_warmup_cosine_scheduler,
    create_warmup_scheduler,
    load_hf_model,
    parse_dtype,
)
from rlt.errors import Refused

LIMIT_S = 60
STEPS = 3


def datum(step: int) -> Datum:
    torch.manual_seed(step)
    tokens = torch.randint(1000, (12,))
    return Datum(tokens[:-1].tolist(), {"target_tokens": tokens[1:], "weights": torch.rand(11)})


def plain(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 + step)
    ids = torch.randint(1000, (2, 9))
    return {"input_ids": ids, "labels": ids}


def train(backend: PyTorchTrainingBackend) -> tuple[list[float], list[torch.Tensor]]:
    losses = []
    for step in range(STEPS):
        for batch in ([datum(step)], plain(step)):
            losses.append(backend.forward_backward(batch).result(LIMIT_S).metrics["loss:sum"])
        backend.optim_step().result(LIMIT_S)
    found = [parameter.detach().clone() for parameter in backend.model.parameters()]
    backend.close()
    return losses, found


def by_hand(model, rates: list[float]) -> tuple[list[float], list[torch.Tensor]]:
    """Without anything of ours: padded rows, log_softmax, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0)
    losses = []
    for step in range(STEPS):
        one, rows = datum(step), plain(step)["input_ids"]
        logits = model(torch.tensor([one.tokens])).logits[0]
        picked = torch.log_softmax(logits, -1).gather(-1, one.loss_inputs["target_tokens"][:, None])[:, 0]
        first = -(one.loss_inputs["weights"] * picked).sum()
        logits = model(rows).logits[:, :-1].flatten(0, 1)
        second = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
        (first + second).backward()
        losses += [first.item(), second.item()]
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("scheduled", [False, True])
def test_each_tier_does_by_hand_what_the_one_above_does(tiny_teacher, tmp_path, scheduled):
    rates = [5e-4, 1e-3, 1e-3] if scheduled else [1e-3] * 3
    if scheduled:
        schedule = {"warmup_steps": 2, "total_steps": 10}
        two = create_backend_with_scheduler(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu", **schedule)
    else:
        two = create_pytorch_backend(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu")
    model = load_hf_model(tiny_teacher, "float32", "cpu")
    optimizer = create_adamw_optimizer(model, learning_rate=1e-3)
    scheduler = create_warmup_cosine_scheduler(optimizer, 2, 10) if scheduled else None
    one = PyTorchTrainingBackend(model, optimizer, create_cross_entropy_loss(), tmp_path, "cpu", scheduler=scheduler)
    losses, found = train(two)
    assert (losses, True) == (train(one)[0], all(map(torch.equal, found, model.parameters())))
    plain_losses, expected = by_hand(load_hf_model(tiny_teacher, device="cpu", attn_implementation="sdpa"), rates)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_schedule_and_numbers_of_a_step_do_not_go_together(tiny_teacher, tmp_path):
    schedule = {"warmup_steps": 1, "total_steps": 3, "decay_style": "linear"}
    backend = create_backend_with_scheduler(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu", **schedule)
    with pytest.raises(Refused, match="has a schedule .*: call optim_step"):
        backend.optim_step(AdamParams()).result(LIMIT_S)
    rates = []
    for step in range(4):
        backend.forward_backward([datum(step)]).result(LIMIT_S)
        rates.append(backend.optim_step().result(LIMIT_S).learning_rate)
    assert rates == pytest.approx([1e-3, 1e-3, 5.5e-4, 1e-4])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.775, 0.55]),
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ],
)
def test_a_rate_rises_and_falls(style, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = create_warmup_scheduler(optimizer, 4, 8, style)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert rates[:7] == pytest.approx(expected)
    assert rates[8:] == pytest.approx([1.0 if style == "constant" else 0.1] * 4)


def test_names_that_are_not_known_name_those_that_are():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(Refused, match="dtype='int8' is not known: float32, fp32"):
        parse_dtype("int8")
    with pytest.raises(Refused, match="decay_style='exp' is not known: cosine, linear, constant would do"):
        create_warmup_scheduler(optimizer, 1, 2, "exp")
    with pytest.raises(Refused, match="warmup_steps=3, total_steps=2"):
        create_warmup_scheduler(optimizer, 3, 2)
    with pytest.raises(Refused, match="embedded/nothing is not an embedded model"):
        create_pytorch_backend("embedded/nothing", "runs/a")
    assert parse_dtype("bf16") is parse_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is done without a GPU")
def test_a_model_goes_to_the_cpu_where_there_is_no_gpu():
    assert compute_device_map_single_gpu() == {"": "cpu"}
    assert compute_device_map_single_gpu("cuda:3") == {"": "cuda:3"}


def test_the_names_are_there_without_pytorch():
    script = (
        "import sys; from backends import create_pytorch_backend, create_backend_with_scheduler; "
        "import backends; assert 'PyTorchTrainingBackend' in backends.__all__; sys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == 0


def test_what_may_run_in_a_lower_precision_does_and_weights_stay_as_they_are(tiny_teacher, tmp_path):
    losses = []
    for autocast in (None, "bfloat16"):
        backend = create_pytorch_backend(tiny_teacher, tmp_path, device="cpu", autocast=autocast)
        losses.append(backend.forward_backward([datum(0)]).result(LIMIT_S).metrics["loss:sum"])
        backend.optim_step(AdamParams(learning_rate=1e-3)).result(LIMIT_S)
        assert all(p.dtype == torch.float32 for p in backend.model.parameters())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_the_embedded_model_learns(tmp_path):
    backend = create_pytorch_backend(EMBEDDED, tmp_path, learning_rate=1e-4)
    losses = []
    for _ in range(3):
        losses.append(backend.forward_backward([datum(0)]).result(LIMIT_S).metrics["loss:sum"])
        backend.optim_step().result(LIMIT_S)
    backend.close()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1
