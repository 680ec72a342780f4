"""The two forms of attention over shared prefixes: FlexAttention with a block mask, and blocks of products."""

import shutil

import pytest
import torch
from transformers.integrations.flex_attention import flex_attention_forward

from rlt.models.attention import Branch, SharedPrefixLayout, block_mask, shared_prefix_attention


class Attention(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled")
def test_flex_attention_of_a_ragged_row_equals_the_cpus():
    branches = (
        Branch(0, 80),
        Branch(80, 90, ((0, 60),)),
        Branch(90, 95, ((0, 60), (80, 87))),
        Branch(95, 165, ((0, 50),)),
        Branch(165, 205, ((0, 50), (95, 125))),
        Branch(205, 208, ((0, 50), (95, 125), (165, 190))),
        Branch(208, 240),
    )
    layout = SharedPrefixLayout(branches, 256)
    torch.manual_seed(0)
    query = torch.randn(1, 4, layout.length, 16)
    key, value = torch.randn(2, 1, 2, layout.length, 16).unbind()
    module = Attention().eval()
    ours, _ = shared_prefix_attention(module, query, key, value, torch.ones(1, 1, 1, 1), layout=layout, scaling=0.25)
    with torch.no_grad():
        mask = block_mask(layout, query.device)
        flex, _ = flex_attention_forward(module, query, key, value, mask, scaling=0.25)
    real = slice(0, branches[-1].end)
    torch.testing.assert_close(ours[:, real], flex[:, real], atol=1e-6, rtol=0)


def test_a_model_that_loses_the_layout_is_refused_and_not_read_wrongly():
    tensors = torch.randn(3, 1, 4, 8, 16).unbind()
    with pytest.raises(RuntimeError, match="lost the packed row's layout"):
        shared_prefix_attention(Attention(), *tensors, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="brought a mask of its own"):
        layout = SharedPrefixLayout((Branch(0, 8),), 8)
        shared_prefix_attention(Attention(), *tensors, torch.ones(1, 1, 8, 8), layout=layout)
