"""Training on packed rows: what attention sees, which rows are taken, what is held out, what a curriculum leaves."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build
from test_preparation_tokens import settings
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from rlt.preparation.run import prepare
from trainers.packed import PackedCollator

SHAPE = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
PRETRAIN = [
    *("run_cfg=pretrain_tiny", "report_to=null", "bf16=false", "warmup_run=null", f"model_shape={SHAPE}"),
    *("max_length=64", "train_batch_size=4", "per_device_train_batch_size=2", "eval_size=0", "eval_steps=null"),
    *("save_steps=100", "logging_steps=1", "curriculum=null", "max_steps=2"),
]


def packed(folder: Path, **keys) -> Path:
    """A preparation's output: short texts, in rows of 64 tokens, by a tokenizer of their own."""
    rows = [{"text": f"{n}: one two three four " * (1 + n % 5)} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "stages": ["read", "split", "tokens", "pack"],
        "train_tokenizer": 300,
        "pack_length": 64,
        "engine_tasks": 1,
    }
    prepare(settings(folder, **{**given, **keys}), lambda: False)
    return folder / "out"


def flash_in_plain_torch(module, query, key, value, attention_mask, position_ids=None, **_):
    """Attention by lengths alone, where transformers would hand FlashAttention lengths; else causal over the row."""
    assert attention_mask is None
    if _is_packed_sequence(position_ids, len(query)):
        (bounds, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        parts = zip(*(x.tensor_split(bounds[1:-1].long(), dim=2) for x in (query, key, value)), strict=True)
        out = torch.cat([scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts], dim=2)
    else:
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("attention", ["eager", "flash_in_plain_torch"])
def test_no_attention_lets_a_sequence_see_another_in_a_micro_batch_of_several_rows(attention, tmp_path):
    AttentionInterface.register("flash_in_plain_torch", flash_in_plain_torch)
    AttentionMaskInterface.register("flash_in_plain_torch", lambda *_, **__: None)
    trainer, _ = build(PRETRAIN, tmp_path / "run", f"dataset_id_or_path={packed(tmp_path)}")
    rows = [trainer.train_dataset[number] for number in range(2)]
    batch, alone = PackedCollator(1)(rows), 0.0
    for row in rows:
        for ids in torch.tensor(row["input_ids"].tolist()).split(row["seq_lengths"].tolist()):
            log_probs = trainer.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            alone -= float(log_probs[:-1].gather(-1, ids[1:, None]).sum())
    assert min(len(row["seq_lengths"]) for row in rows) > 1
    trainer.model.config._attn_implementation = attention
    assert float(trainer._nll(trainer.model, batch)) == pytest.approx(alone, rel=1e-4)
