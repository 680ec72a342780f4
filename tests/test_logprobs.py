"""Packed log-probs against one row at a time, the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from logprobs import token_log_probs
from logprobs.packing import batch_packs, common_prefix, lay_out, pack_group

VOCABULARY = 53


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


def one_row_at_a_time(model, sequences, counted, temperature):
    """The oracle: plain forward passes without packing, masks or chunks."""
    rows = []
    for ids, where in zip(sequences, counted, strict=True):
        log_probs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0] / temperature, dim=-1)
        rows.append(torch.stack([log_probs_TV[i - 1, ids[i]] for i in where]) if where else torch.zeros(0))
    return rows


TOKENS = st.integers(0, VOCABULARY - 1)
GROUPS = st.lists(
    st.tuples(
        st.lists(TOKENS, min_size=1, max_size=12), st.lists(st.lists(TOKENS, max_size=8), min_size=1, max_size=5)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, budget=st.integers(1, 80), data=st.data())
def test_random_ragged_groups_equal_one_row_at_a_time(model, groups, budget, data):
    sequences, members = [], []
    for prefix, suffixes in groups:
        members.append(range(len(sequences), len(sequences) + len(suffixes)))
        sequences += [prefix + suffix for suffix in suffixes]
    counted = [data.draw(st.sets(st.integers(1, len(s) - 1)).map(sorted)) if len(s) > 1 else [] for s in sequences]
    ours, _ = token_log_probs(model, sequences, counted, members, temperature=0.7, token_budget=budget)
    for a, b in zip(ours, one_row_at_a_time(model, sequences, counted, 0.7), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-9, rtol=0)


def group_of_three(offset=0):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    return [prompt + [(5 + offset + i) % VOCABULARY for i in range(n)] for n in (6, 3, 1)]


def test_gradients_equal_one_row_at_a_time_with_and_without_checkpointing(model, monkeypatch):
    sequences = group_of_three()
    counted = [list(range(8, len(s))) for s in sequences]

    def gradients(log_probs):
        model.zero_grad()
        torch.cat(log_probs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(one_row_at_a_time(model, sequences, counted, 1.0))
    for chunk in (2**26, 2 * VOCABULARY):  # one chunk, and chunks of two positions computed again on the way back
        monkeypatch.setattr("logprobs.engine.HEAD_CHUNK_ELEMENTS", chunk)
        ours = gradients(token_log_probs(model, sequences, counted, [range(3)], token_budget=64)[0])
        for a, b in zip(ours, expected, strict=True):
            # RMSNorm computes in float32 in transformers, which bounds what float64 can show.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_entropies_are_those_of_the_softmax(model):
    sequences = group_of_three()
    counted = [[8], [9], [8]]
    _, entropies = token_log_probs(
        model, sequences, counted, [range(3)], temperature=0.5, token_budget=64, entropy="value"
    )
    for ids, where, ours in zip(sequences, counted, entropies, strict=True):
        probs = torch.softmax(model(torch.tensor([ids])).logits[0, where[0] - 1] / 0.5, dim=-1)
        assert ours.item() == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-9)


def test_a_soft_cap_on_the_logits_is_kept():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        attn_implementation="sdpa",
    )
    capped = Gemma2ForCausalLM(config).double().eval()
    sequences, counted = [[3, 1, 4, 1, 5]], [[2, 3, 4]]
    ours, _ = token_log_probs(capped, sequences, counted, [[0]], token_budget=64)
    torch.testing.assert_close(ours[0], one_row_at_a_time(capped, sequences, counted, 1.0)[0], atol=1e-6, rtol=0)


def test_a_shared_prompt_is_laid_out_once_and_siblings_do_not_see_each_other():
    sequences = group_of_three()
    assert common_prefix(sequences) == 9  # the prompt of 8, and the first token that all three wrote
    (pack,) = pack_group(sequences, [0, 1, 2], token_budget=64)
    assert pack.length == 9 + 5 + 2 + 0
    mask = lay_out([pack], sequences, torch.device("cpu"))["attention_mask"][0, 0]
    last_of_second, last_of_third = 10, 15
    assert mask[last_of_third].nonzero().flatten().tolist() == [*range(9), 11, 12, 13, 14, 15]
    assert mask[last_of_second].nonzero().flatten().tolist() == list(range(11))


def test_packs_and_batches_stay_within_the_budget():
    sequences = group_of_three()
    packs = pack_group(sequences, [0, 1, 2], token_budget=14)
    assert [pack.length for pack in packs] == [11, 14]
    assert [len(batch) for batch in batch_packs(packs, token_budget=28)] == [2]
    assert [len(batch) for batch in batch_packs(packs, token_budget=27)] == [1, 1]
