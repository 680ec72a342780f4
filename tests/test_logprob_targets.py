"""Log-probs of tokens that are asked for, instead of a sequence's own next ones."""

import pytest
import torch
from test_logprobs import VOCABULARY, gradients, group_of_three, llama, one_row_at_a_time

from rlt.logprobs import token_log_probs

SEQUENCES = [*group_of_three(), *group_of_three(offset=7), [5, 6, 7]]
EVERYWHERE = [list(range(1, len(ids) + 1)) for ids in SEQUENCES]


def targets(k: int | None, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(VOCABULARY, (len(ids),) if k is None else (len(ids), k)) for ids in SEQUENCES]


def plain(model, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    """The oracle: each sequence alone, log_softmax and gather."""
    rows = []
    for ids, asked in zip(SEQUENCES, wanted, strict=True):
        log_probs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        rows.append(log_probs_TV.gather(-1, asked.view(len(ids), -1)).view(asked.shape))
    return rows


@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("entropy", ["value", "with_grad"])  # two forms of the head
@pytest.mark.parametrize("attention", ["shared_prefix", "sdpa"])
def test_they_equal_log_softmax_and_gather_gradients_too(k, entropy, attention):
    model, wanted = llama(attn_implementation=attention), targets(k)
    asked = [rows.tolist() for rows in wanted]
    ours, _ = token_log_probs(model, SEQUENCES, EVERYWHERE, targets=asked, token_budget=40, entropy=entropy)
    expected = plain(model, wanted)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    flat = [[value.flatten() for value in values] for values in (ours, expected)]
    for a, b in zip(gradients(model, flat[0]), gradients(model, flat[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # RMSNorm computes in float32


def test_a_token_that_is_asked_for_twice_at_one_place_counts_twice():
    model = llama()
    asked = [[[7, 7]] * len(ids) for ids in SEQUENCES]
    ours, _ = token_log_probs(model, SEQUENCES, EVERYWHERE, targets=asked, token_budget=64)
    twice = gradients(model, [values.flatten() for values in ours])
    once = gradients(model, plain(model, [torch.full((len(ids), 2), 7) for ids in SEQUENCES]))
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_sequences_own_tokens_are_the_default_to_the_last_bit():
    model = llama()
    counted = [list(range(1, len(ids))) for ids in SEQUENCES]
    own = [ids[1:] for ids in SEQUENCES]
    ours, _ = token_log_probs(model, SEQUENCES, counted, token_budget=40)
    asked, _ = token_log_probs(model, SEQUENCES, counted, targets=own, token_budget=40)
    assert all(torch.equal(a, b) for a, b in zip(ours, asked, strict=True))
    for a, b in zip(ours, one_row_at_a_time(model, SEQUENCES, counted, 1.0), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
