"""Losses against hand-worked and public numbers, autograd, and what is refused before anything is read."""

import math
from types import SimpleNamespace

import pytest
import torch

from backends import losses
from backends.loss_table import LOSSES, check_data, find_loss
from backends.protocol import Datum
from rlt.errors import Refused

LOG_PROBS = [0.0, -1.0, -2.0, -0.5]
SAMPLED = torch.tensor([0.0, -1.2, -1.5, -0.5], dtype=torch.double)
ADVANTAGES = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.double)
NARROW = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
RL = {"logprobs": SAMPLED, "advantages": ADVANTAGES}
GOLDEN = {  # loss, inputs, configuration, value, gradient
    "cross_entropy": ("cross_entropy", {"weights": torch.tensor([0.0, 1, 1, 0.5])}, {}, 3.25, [0, -1, -1, -0.5]),
    "importance_sampling": ("importance_sampling", RL, {}, -1.114872, [0, -1.221403, 0.606531, -0.5]),
    "ppo": ("ppo", RL, {}, -0.9, [0, 0, 0, -0.5]),
    "ppo, narrow": ("ppo", RL, NARROW, -0.7, [0, 0, 0, -0.5]),
    "cispo": ("cispo", RL, {}, -0.15, [0, -1.2, 0.8, -0.5]),
    "cispo, narrow": ("cispo", RL, NARROW, -0.45, [0, -1.1, 0.9, -0.5]),
    "dro": ("dro", RL, {"beta": 0.05}, -0.74275, [0, -0.99, 0.975, -0.5]),
    "gspo": (
        "gspo",
        {**RL, "sequence_ratio_mask": torch.tensor([0.0, 1, 1, 1])},
        {},
        -0.452419,
        [0, -0.904837, 0.904837, -0.452419],
    ),
}


def log_probs() -> torch.Tensor:
    return torch.tensor(LOG_PROBS, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("case", GOLDEN)
def test_values_and_gradients_are_the_golden_ones(case):
    name, inputs, config, value, gradient = GOLDEN[case]
    values, loss = log_probs(), find_loss(name)
    total = loss.compute(values, **inputs, **loss.config(config)).sum()
    total.backward()
    assert total.item() == pytest.approx(value, abs=1e-6)
    assert values.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_two_steps_of_adamw_are_the_golden_ones():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.double))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1)
    found = []
    for gradient in (0.5, -0.2):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        found.append(weight.item())
    assert found == pytest.approx([0.9989, 0.9984513134186306], abs=1e-12)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo", "grpo"])
def test_a_prompt_far_from_its_zeros_adds_nothing_and_stays_finite(name):
    values = torch.tensor([-500.0, -1.0], requires_grad=True)  # exp(-500 - 0) and, the other way, exp(500)
    inputs = {"logprobs": torch.tensor([-2000.0, -1.0]), "advantages": torch.tensor([0.0, 2.0])}
    more = {"gspo": {"sequence_ratio_mask": torch.tensor([0.0, 1.0])}}.get(name, {})
    loss = find_loss(name)
    total = loss.compute(values, **inputs, **more, **loss.defaults).sum()
    total.backward()
    assert values.grad.tolist() == pytest.approx([0.0, -2.0])
    assert total.item() == pytest.approx(2.0 if name == "cispo" else -2.0)


def test_dros_square_leaves_prompts_out():
    values = torch.tensor([-3.0, -1.0], requires_grad=True)
    losses.dro(values, torch.tensor([0.0, -2.0]), torch.tensor([0.0, 1.0]), beta=1.0).sum().backward()
    assert values.grad.tolist() == [0.0, 0.0]  # -(A - beta (log p - log q))


def test_cross_entropy_takes_several_targets_and_weights_of_any_sign():
    values = torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]], requires_grad=True)
    weights = torch.tensor([[2.0, -0.5], [1000.0, 0.0]])
    total = losses.cross_entropy(values, weights).sum()
    total.backward()
    assert total.item() == pytest.approx(2 - 1 + 3000)
    assert values.grad.tolist() == [[-2.0, 0.5], [-1000.0, 0.0]]


def test_grpo_of_fresh_samples_and_its_distance_to_a_reference():
    values = log_probs()
    weights, reference = torch.tensor([0.0, 0.5, 0.5, 0.5]), torch.tensor([9.0, -1.5, -2.0, -0.5])
    loss = losses.grpo(values, ADVANTAGES, weights=weights, ref_logprobs=reference, beta=0.1)
    loss.sum().backward()
    away = math.exp(-0.5) + 0.5 - 1
    assert loss.tolist() == pytest.approx([0, -0.5 + 0.05 * away, 0.5, -0.25], abs=1e-7)
    gradient = -0.5 + 0.05 * (1 - math.exp(-0.5) + away)  # of the term, and of the ratio that it is multiplied by
    assert values.grad.tolist() == pytest.approx([0, gradient, 0.5, -0.25], abs=1e-7)
    with pytest.raises(Refused, match="needs ref_logprobs"):
        losses.grpo(values, ADVANTAGES, beta=0.1)


def test_grpo_is_ppo_by_another_name_of_its_bounds():
    wide = {"epsilon": 0.2, "epsilon_high": 0.2}
    a, b = losses.grpo(log_probs(), ADVANTAGES, SAMPLED, **wide), losses.ppo(log_probs(), SAMPLED, ADVANTAGES)
    torch.testing.assert_close(a, b)


def test_dpo_compares_neighbours():
    rows = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    reference = [torch.tensor([-9.0, -3.0]), torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    weights = [torch.tensor([0.0, 1.0]), torch.ones(1), torch.ones(1), torch.ones(1)]
    found = losses.dpo(rows, reference, weights, beta=0.5)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.5 * (1 - -1))), math.log(2)], abs=1e-6)


def test_the_loss_of_outputs_is_the_sum_of_what_each_label_costs():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[0, 3, -100], [1, 2, 4]])
    found = losses.compute_loss_from_outputs(SimpleNamespace(logits=logits), labels, "causal_lm")
    rows = torch.log_softmax(logits, -1)
    assert found.item() == pytest.approx(-(rows[0, 0, 3] + rows[1, 0, 2] + rows[1, 1, 4]).item(), abs=1e-5)
    with pytest.raises(Refused, match="'reward_model' is not known: causal_lm would do"):
        losses.compute_loss_from_outputs(SimpleNamespace(logits=logits), labels, "reward_model")


def test_inputs_and_configuration_are_those_of_the_signature():
    assert find_loss("gspo").inputs == {"logprobs": True, "advantages": True, "sequence_ratio_mask": True}
    assert find_loss("cross_entropy").inputs == {"weights": False}
    assert find_loss("dro").defaults == {"beta": 0.05}
    assert find_loss("ppo").config({"clip_low_threshold": 0}) == {"clip_low_threshold": 0, "clip_high_threshold": 1.2}


def test_losses_that_are_not_known_name_those_that_are():
    with pytest.raises(Refused, match="stable_reinforce: its formula is not public; cross_entropy, .*dpo would do"):
        find_loss("stable_reinforce")
    with pytest.raises(Refused, match="loss_fn='ppoo' is not known: cross_entropy"):
        find_loss("ppoo")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"epsilon": 0.2}, "does not know the configuration 'epsilon': clip_low_threshold, clip_high_threshold would"),
        ({"clip_low_threshold": math.nan}, "clip_low_threshold=nan is not a number"),
        ({"clip_low_threshold": "0.8"}, "clip_low_threshold='0.8' is not a number"),
    ],
)
def test_configurations_that_cannot_work_are_refused(config, said):
    with pytest.raises(Refused, match=said):
        find_loss("ppo").config(config)


def datum(tokens=(1, 2, 3), **changed) -> Datum:
    inputs = {"target_tokens": torch.tensor([2, 3, 4]), "logprobs": torch.zeros(3), "advantages": torch.zeros(3)}
    inputs = {name: value for name, value in (inputs | changed).items() if value is not None}
    return Datum(list(tokens), inputs)


BAD = {
    "datum 1 is a dict, not a Datum": {"tokens": [1]},
    "datum 1: logprobs is a list, not a tensor": datum(logprobs=[0.0, 0.0, 0.0]),
    "datum 1 has no tokens": datum(tokens=()),
    "datum 1 has 5 tokens, and the model reads 4 at most": datum(tokens=(1,) * 5),
    "datum 1: its tokens must be whole numbers from 0 to 9": datum(tokens=(1, 10, 2)),
    "datum 1: its tokens must be whole numbers": datum(tokens=(1, 2.5, 2)),
    "datum 1 has no target_tokens": datum(target_tokens=None),
    r"target_tokens has the shape \(2,\), and \(3,\) would do": datum(target_tokens=torch.tensor([1, 2])),
    r"target_tokens has the shape \(3, 1\), and \(3,\) would": datum(target_tokens=torch.ones(3, 1, dtype=torch.long)),
    "target_tokens must be whole numbers, not torch.float32": datum(target_tokens=torch.ones(3)),
    "target_tokens must be from 0 to 9": datum(target_tokens=torch.tensor([1, -1, 2])),
    "datum 1 has no advantages, which loss_fn=ppo needs": datum(advantages=None),
    r"advantages has the shape \(2,\), and target_tokens \(3,\)": datum(advantages=torch.zeros(2)),
    "logprobs has values that are no finite numbers": datum(logprobs=torch.tensor([0, math.nan, 0])),
    "advantages has values that are no finite": datum(advantages=torch.tensor([0, math.inf, 0])),
}


@pytest.mark.parametrize("said", BAD)
def test_data_that_cannot_work_are_refused_by_their_number(said):
    with pytest.raises(Refused, match=said):
        check_data(LOSSES["ppo"], [datum(), BAD[said]], 10, 4)


def test_data_may_carry_more_than_a_loss_reads():
    check_data(LOSSES["ppo"], [datum(spans=torch.zeros(7), mask=torch.full((3,), math.nan))], 10, 4)


def test_a_batch_of_nothing_and_half_a_pair_are_refused():
    with pytest.raises(Refused, match="no data"):
        check_data(LOSSES["ppo"], [], 10, 4)
    with pytest.raises(Refused, match="3 data are no pairs"):
        check_data(LOSSES["dpo"], [datum(ref_logprobs=torch.zeros(3))] * 3, 10, 4)
