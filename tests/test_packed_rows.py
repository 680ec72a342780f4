"""Training on packed rows: what attention sees, which rows are taken, what is held out, what a curriculum leaves."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build
from test_preparation_tokens import prepare_whole, settings
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from rlt.errors import Refused
from rlt.planning.curriculum import Phase
from rlt.runs.folder import TOKENS
from rlt.tokens.files import array_file, writing_arrays
from trainers.curriculum import CurriculumSampler
from trainers.packed import PackedCollator, held_out_by_source

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
    prepare_whole(settings(folder, **{**given, **keys}))
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


TRACES = [{"question": f"{n} + 1?", "solution": f"{n + 1}", "reasoning_trace": f"so {n} and 1"} for n in range(8)]


def sft(run: str, folder: Path, rows: str, model: str):
    options = ["report_to=null", "bf16=false", "warmup_run=null", "max_steps=1", "eval_size=0", "eval_steps=null"]
    options += ["load_best_model_at_end=false", f"dataset_id_or_path={rows}", f"model_name_or_path={model}"]
    return build([f"run_cfg={run}", *options], folder)[0]


def trained_tokens(trainer) -> int:
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    return sum(int((trainer.data_collator([row])["labels"] != -100).sum()) for row in rows)


def test_a_teachers_warm_up_from_a_preparation_trains_the_tokens_of_the_same_rows_given_directly(
    tiny_teacher, tmp_path
):
    given = tmp_path / "rows.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in TRACES))
    keys = {"tokenizer": tiny_teacher, "pack_length": 256, "engine_tasks": 1}
    prepare_whole(settings(tmp_path, stages=["read", "write", "tokens", "pack"], **keys))
    out = str(tmp_path / "out")
    direct = sft("teacher_sft_tiny", tmp_path / "a", str(given), tiny_teacher)
    prepared = sft("teacher_sft_tiny", tmp_path / "b", out, tiny_teacher)
    assert len(prepared.train_dataset) == len(direct.train_dataset) == 8
    assert trained_tokens(prepared) == trained_tokens(direct) > 8 * 8
    packed_rows = sft("student_sft_tiny", tmp_path / "c", out, tiny_teacher)
    assert "seq_lengths" in packed_rows.train_dataset.column_names
    prepare_whole(settings(tmp_path, stages=["read", "tokens", "pack"], **keys))
    with pytest.raises(Refused, match="packed with tokens_as=chat alone, and a teacher is trained"):
        sft("teacher_sft_tiny", tmp_path / "d", out, tiny_teacher)


def sampler(buckets: list[int], phases: list[Phase], **keys) -> CurriculumSampler:
    options = {"max_length": 64, "rows_each": 2, "rounds_of_step": 1, "steps": 50, "seed": 0}
    return CurriculumSampler(buckets, phases, **{**options, **keys})


def test_no_row_stands_twice_in_micro_batches_that_are_trained_on_at_once():
    ranks = [list(sampler([32] * 11, [Phase(None, {32: 1.0})], rank=rank, ranks=2)) for rank in range(2)]
    together = [[*mine, *theirs] for mine, theirs in zip(*ranks, strict=True)]
    assert all(len(set(rows)) == len(rows) == 8 for rows in together)
    assert {row for rows in together for row in rows} == set(range(11))
    with pytest.raises(Refused, match="7 packed rows have 32 tokens, and 8 are taken at once"):
        sampler([32] * 7, [Phase(None, {32: 1.0})], ranks=2)


def test_lengths_that_no_phase_names_are_said(caplog):
    sampler([16] * 5 + [32] * 8 + [64] * 2, [Phase(1, {32: 1.0}), Phase(None, {64: 1.0})])
    (line,) = caplog.messages
    assert line == "curriculum: no phase names 16 tokens: 5 packed rows, of 80 tokens with their padding, are left out"


def test_held_out_sequences_that_are_too_long_are_left_out_and_said(tmp_path, caplog):
    columns = ("input_ids", "loss_mask", "length", "id", "source", "kind")
    with writing_arrays(array_file(tmp_path / TOKENS, "validation", 0), columns) as write:
        for number, length in enumerate([9, 4, 3, 5]):
            ids = [10 * number + place for place in range(length)]
            write(dict(zip(columns, (ids, [1] * length, length, str(number), "web", "text"), strict=True)))
    held = held_out_by_source(tmp_path, 10, 4)
    assert sorted(row["input_ids"].tolist() for row in held["web"]) == [[10, 11, 12, 13], [20, 21, 22]]
    assert caplog.messages == ["web: 2 held-out sequences are longer than max_length=4 and left out"]
