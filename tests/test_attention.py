"""The two forms of attention over shared prefixes: FlexAttention with a block mask, and blocks of products."""

import shutil

import pytest
import torch
from transformers import MinistralConfig
from transformers.integrations.flex_attention import flex_attention_forward

from rlt.models.attention import (
    Branch,
    SharedPrefixLayout,
    _masked_attention,
    block_mask,
    shared_prefix_attention,
)
from rlt.models.cpu_attention import blocks_of


class Attention(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


BRANCHES = (
    Branch(0, 80),
    Branch(80, 90, ((0, 60),)),
    Branch(90, 95, ((0, 60), (80, 87))),
    Branch(95, 165, ((0, 50),)),
    Branch(165, 205, ((0, 50), (95, 125))),
    Branch(205, 208, ((0, 50), (95, 125), (165, 190))),
    Branch(208, 240),
)
LAYOUT = SharedPrefixLayout(BRANCHES, 256)
WINDOWS = [None, 1, 7, 33, 70, 500]


def query_key_value(dtype=torch.float32):
    torch.manual_seed(0)
    query = torch.randn(1, 4, LAYOUT.length, 16, dtype=dtype)
    return query, *torch.randn(2, 1, 2, LAYOUT.length, 16, dtype=dtype).unbind()


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (33, None), (7, 2.0)])
def test_flex_attention_of_a_ragged_row_equals_the_cpus(window, softcap):
    tensors, module = query_key_value(), Attention().eval()
    options = {"scaling": 0.25, "sliding_window": window, "softcap": softcap}
    ours, _ = shared_prefix_attention(module, *tensors, torch.ones(1, 1, 1, 1), layout=LAYOUT, **options)
    with torch.no_grad():
        mask = block_mask(LAYOUT, tensors[0].device, window)
        flex, _ = flex_attention_forward(module, *tensors, mask, **options)
    real = slice(0, BRANCHES[-1].end)
    torch.testing.assert_close(ours[:, real], flex[:, real], atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_blocks_equal_one_product_under_a_dense_mask(window, softcap, with_sinks, monkeypatch):
    """In float64, gradients included; a block has 16 queries, so that each branch has several."""
    monkeypatch.setattr("rlt.models.cpu_attention.BLOCK_ELEMENTS", 1)
    tensors = [x.requires_grad_() for x in query_key_value(torch.float64)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    index = torch.arange(LAYOUT.length)
    rule = LAYOUT.may_look(index.device, window)
    dense = rule(0, 0, index[:, None], index[None, :])
    options = {"scaling": 0.25, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    ours, _ = shared_prefix_attention(Attention(), *tensors, torch.ones(1, 1, 1, 1), layout=LAYOUT, **options)
    plain = _masked_attention(Attention(), *tensors, dense[None, None], softcap, sinks, 0.25)
    real = slice(0, BRANCHES[-1].end)
    weights = torch.randn(ours[:, real].shape, dtype=torch.float64)
    inputs = [*tensors, sinks] if with_sinks else tensors
    found, expected = (torch.autograd.grad((x[:, real] * weights).sum(), inputs) for x in (ours, plain))
    torch.testing.assert_close(ours[:, real], plain[:, real], atol=1e-12, rtol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_a_window_counts_positions_in_the_sequence_and_not_places_in_the_row():
    """Tokens 0 to 3, then 4 and 5 behind token 1, then 6 behind all of 0, 1, 4, 5."""
    layout = SharedPrefixLayout((Branch(0, 4), Branch(4, 6, ((0, 2),)), Branch(6, 7, ((0, 2), (4, 6)))), 7)
    assert layout.positions().tolist() == [0, 1, 2, 3, 2, 3, 4]
    index = torch.arange(7)
    looks = layout.may_look(index.device, 3)(0, 0, index[:, None], index[None, :])
    seen = [keys.nonzero().flatten().tolist() for keys in looks]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [0, 1, 4], [1, 4, 5], [4, 5, 6]]
    blocks = list(blocks_of(layout.branches, 4, 3))
    assert [[list(range(7))[keys] for keys in block.seen] for block in blocks] == [
        [[0, 1, 2, 3]],
        [[0, 1], [4, 5]],
        [[4, 5], [6]],
    ]


def test_a_layer_that_hides_its_window_is_refused_and_not_read_wrongly():
    module = Attention()
    module.config, module.layer_idx = MinistralConfig(num_hidden_layers=1, layer_types=["sliding_attention"]), 0
    with pytest.raises(RuntimeError, match="does not say its sliding window"):
        shared_prefix_attention(module, *query_key_value(), torch.ones(1, 1, 1, 1), layout=LAYOUT)


def test_a_model_that_loses_the_layout_is_refused_and_not_read_wrongly():
    tensors = torch.randn(3, 1, 4, 8, 16).unbind()
    with pytest.raises(RuntimeError, match="lost the packed row's layout"):
        shared_prefix_attention(Attention(), *tensors, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="brought a mask of its own"):
        layout = SharedPrefixLayout((Branch(0, 8),), 8)
        shared_prefix_attention(Attention(), *tensors, torch.ones(1, 1, 8, 8), layout=layout)
