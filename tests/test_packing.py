"""Packed rows: nothing is lost or cut in silence, little room is left, and no sequence sees another."""

import json
from itertools import accumulate, product

import numpy
import pytest
import torch
from conftest import build, config_of
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_preparation_tokens import outputs, prepare_whole, settings, write_texts
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlt.data.sources import load_rows
from rlt.errors import Refused
from rlt.logprobs import token_log_probs
from rlt.models.loading import load_policy, load_tokenizer
from rlt.planning.trl_fields import typed_settings
from rlt.preparation.pack import WINDOW, Packer, check_ledger, pieces
from rlt.preparation.run import prepare
from rlt.preparation.shards import read_shard, shard
from rlt.prompts.styles import load_format
from rlt.runs.folder import PACKED, TOKENS
from rlt.tokens.bins import best_fit_decreasing
from rlt.tokens.files import array_file, read_arrays
from trainers.examples import sft_examples
from trainers.packed import IGNORED, PackedCollator, check_made_for, packed_files, sequences_of, unigram_entropy

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60)


def test_the_longest_goes_first_each_to_the_row_with_the_least_room():
    bins = best_fit_decreasing([3, 7, 5, 2, 3], [10])
    assert [one.members for one in bins] == [[1, 0], [2, 4, 3]]  # 7 + 3, 5 + 3 + 2


def test_a_row_is_opened_in_the_least_length_that_holds_the_sequence():
    bins = best_fit_decreasing([9, 3, 4, 1, 2], [4, 8, 16])
    assert [(one.length, one.members) for one in bins] == [(16, [0, 2, 1]), (4, [4, 3])]


def naive(lengths: list[int], size: int) -> list[int]:
    """Rooms left by best-fit decreasing, by looking at every row for each sequence."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(size - length)
    return sorted(rooms)


@given(LENGTHS)
def test_every_sequence_stands_in_one_row_and_the_rooms_are_those_of_a_naive_search(lengths):
    bins = best_fit_decreasing(lengths, [32])
    assert sorted(number for one in bins for number in one.members) == list(range(len(lengths)))
    assert sorted(32 - sum(lengths[n] for n in one.members) for one in bins) == naive(lengths, 32)


def fewest_rows(lengths: list[int], size: int) -> int:
    """By trying every assignment."""
    for rows in range(1, len(lengths) + 1):
        for places in product(range(rows), repeat=len(lengths) - 1):
            filled = numpy.bincount([0, *places], weights=lengths, minlength=rows)
            if filled.max() <= size:
                return rows
    raise AssertionError(lengths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_the_rows_are_near_the_fewest_that_there_can_be(lengths):
    found, best = len(best_fit_decreasing(lengths, [12])), fewest_rows(lengths, 12)
    assert best <= found <= 11 * best / 9 + 6 / 9  # what is proved of it


@given(LENGTHS, st.sampled_from([[32], [8, 32], [4, 8, 16, 32]]))
def test_rows_of_several_lengths_hold_what_they_should(lengths, sizes):
    for one in best_fit_decreasing(lengths, sizes):
        filled = sum(lengths[n] for n in one.members)
        assert one.length in sizes and filled <= one.length
        assert one.length == min(size for size in sizes if size >= lengths[one.members[0]])


@pytest.mark.parametrize(
    ("length", "expected"), [(4, [4]), (9, [8, 1]), (27, [16, 8, 3]), (40, [16, 16, 8]), (2, [2]), (32, [16, 16])]
)
def test_a_text_is_cut_in_the_longest_rows_that_it_fills(length, expected):
    assert pieces(length, [4, 8, 16]) == expected


@pytest.mark.parametrize(("mean", "spread"), [(5.3, 0.8), (7.2, 0.9)], ids=["short chat", "reasoning"])
@pytest.mark.parametrize("size", [2048, 8192])
def test_rows_are_full(mean, spread, size):
    drawn = numpy.random.default_rng(0).lognormal(mean, spread, 2 * WINDOW).astype(int) + 1
    windows = [[n for length in part.tolist() for n in pieces(length, [size])] for part in numpy.array_split(drawn, 2)]
    rows = sum(len(best_fit_decreasing(lengths, [size])) for lengths in windows)
    assert drawn.sum() / (rows * size) >= 0.998


def test_where_long_rows_are_dropped_the_rows_are_nearly_the_fewest():
    """Most of what is left is longer than half a row, with too little beside it: no packing fills such rows."""
    drawn = numpy.random.default_rng(0).lognormal(7.2, 0.9, WINDOW).astype(int) + 1
    lengths = drawn[drawn <= 2048]
    needed = at_least(lengths, 2048)
    assert lengths.sum() / (needed * 2048) < 0.998
    assert len(best_fit_decreasing(lengths.tolist(), [2048])) <= 1.003 * needed


def at_least(lengths, size: int) -> int:
    """Rows that no packing does without (Martello and Toth's bound L2)."""
    best = 0
    for small in range(0, size // 2 + 1, 4):
        large = lengths[lengths > size - small]
        middle = lengths[(lengths <= size - small) & (2 * lengths > size)]
        rest = lengths[(2 * lengths <= size) & (lengths >= small)].sum() - (len(middle) * size - middle.sum())
        best = max(best, len(large) + len(middle) + max(0, -(-rest // size)))
    return int(best)


def row(number: int, length: int, trained: int | None = None) -> dict:
    """Ids that tell each token of each row apart; the last `trained` of them are trained."""
    mask = numpy.zeros(length, dtype=numpy.uint8)
    mask[length - (length if trained is None else trained) :] = 1
    ids = numpy.arange(length, dtype=numpy.int32) + 1000 * number
    return {"input_ids": ids, "loss_mask": mask, "length": length, "id": f"r{number}", "source": "s", "kind": "text"}


def packed_of(rows: list[dict], sizes: list[int], overflow: str) -> tuple[list[dict], Packer, list]:
    written: list[dict] = []
    packer = Packer(sizes, written.append)
    dropped = [packer.take(one, overflow) for one in rows]
    packer.close()
    return written, packer, dropped


@given(LENGTHS, st.sampled_from(["drop", "split"]), st.sampled_from([[12], [4, 12]]))
def test_every_token_of_a_kept_row_stands_in_one_packed_row(lengths, overflow, sizes):
    rows = [row(n, length) for n, length in enumerate(lengths)]
    written, packer, dropped = packed_of(rows, sizes, overflow)
    kept = []
    for one, gone in zip(rows, dropped, strict=True):
        if gone is None:
            ends = list(accumulate(pieces(one["length"], sizes)))[:-1] if overflow == "split" else []
            kept += [part for part in numpy.split(one["input_ids"], ends) if len(part) > 1]
    found = [ids for one in written for ids in one["input_ids"]]
    assert sorted(found) == sorted(token for ids in kept for token in ids)
    for one in written:
        assert sum(one["seq_lengths"]) == len(one["input_ids"]) <= one["bucket"]
        parts = numpy.split(one["input_ids"], list(accumulate(one["seq_lengths"]))[:-1])
        assert [int(part[0]) // 1000 for part in parts] == [int(name[1:]) for name in one["ids"]]
        assert all((numpy.diff(part) == 1).all() for part in parts)  # in order, of one row
    check_ledger(packer.figures)
    assert packer.figures["tokens_in"] == sum(lengths)
    assert (packer.figures["tokens_of_dropped_rows"] == 0) == all(gone is None for gone in dropped)


def test_a_longer_row_is_dropped_split_or_an_error():
    rows = [row(1, 5), row(2, 9)]
    written, packer, dropped = packed_of(rows, [8], "drop")
    assert dropped[0] is None and dropped[1].reason == "longer than pack_length"
    assert (packer.figures["tokens_packed"], packer.figures["tokens_of_dropped_rows"]) == (5, 9)
    written, packer, dropped = packed_of(rows, [8], "split")
    assert dropped == [None, None] and [one["seq_lengths"] for one in written] == [[8], [5]]
    assert packer.figures["tokens_without_a_label"] == 1  # nothing stands before it
    with pytest.raises(Refused, match="row r2 has 9 tokens, and pack_length=8"):
        packed_of(rows, [8], "error")


def test_a_piece_that_trains_nothing_is_left_out_and_counted():
    written, packer, _ = packed_of([row(1, 10, trained=1)], [8], "split")
    assert [one["input_ids"].tolist() for one in written] == [[1008, 1009]]
    assert packer.figures["tokens_without_a_label"] == 8
    assert packed_of([row(1, 1)], [8], "split")[2][0].reason == "no token with a label"


def test_conversations_are_dropped_and_texts_are_split_unless_a_key_says_otherwise(tmp_path):
    long = "word " * 100
    rows = [{"question": "a?", "solution": "b", "reasoning_trace": long}, {"question": "a?", "solution": "b!"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    keys = {"stages": ["read", "tokens", "pack"], "tokenizer": "embedded/smollm2-135m-instruct", "pack_length": 64}
    results = prepare(settings(tmp_path, engine_tasks=1, **keys), lambda: False)
    assert dict(results[-1].counts.dropped) == {"longer than pack_length": 1}
    results = prepare(settings(tmp_path, engine_tasks=1, pack_overflow="split", **keys), lambda: False)
    assert results[-1].counts.dropped == {} and results[-1].counts.notes["rows_cut"] == 1
    with pytest.raises(Refused, match="pack_overflow=drop leaves it out"):
        prepare(settings(tmp_path, engine_tasks=1, pack_overflow="error", **keys), lambda: False)


PACKING = {"stages": ["read", "split", "tokens", "pack"], "train_tokenizer": 300, "pack_length": 64}


def test_packing_is_the_same_after_a_task_that_was_cut_off(tmp_path):
    write_texts(tmp_path)
    prepare(settings(tmp_path, **PACKING), lambda: False)
    first = outputs(tmp_path / "out")
    (tmp_path / "out/stages/03-pack/stats.json").unlink()  # as if it had not ended
    (tmp_path / "out/packed/train-00001.parquet.tmp").write_bytes(b"half")
    prepare(settings(tmp_path, **PACKING), lambda: False)
    assert {name: text for name, text in outputs(tmp_path / "out").items() if "tmp" not in name} == first


@pytest.mark.slow
def test_packing_is_the_same_on_two_processes(tmp_path):
    write_texts(tmp_path)
    prepare(settings(tmp_path, **PACKING), lambda: False)
    prepare(settings(tmp_path, output_dir=str(tmp_path / "two"), **PACKING, engine_workers=2), lambda: False)
    assert outputs(tmp_path / "two") == outputs(tmp_path / "out")


def test_the_records_of_a_stage_and_its_arrays_are_the_same_rows(tmp_path):
    write_texts(tmp_path)
    prepare(settings(tmp_path, **PACKING), lambda: False)
    for number in range(4):
        records = read_shard(shard(tmp_path / "out/stages/03-pack/shards", number))
        tokens = read_arrays(array_file(tmp_path / "out" / TOKENS, "train", number))
        packed = read_arrays(array_file(tmp_path / "out" / PACKED, "train", number))
        ids = [record["id"] for record in records]
        assert ids == [one["id"] for one in tokens]
        assert sorted(set(ids)) == sorted({name for one in packed for name in one["ids"]})


# Training on them

THREE = ([5, 6, 7, 8, 9], [5, 6, 11], [12, 13, 14, 15])


def packed_row(sequences=THREE, mask: list[int] | None = None) -> dict:
    ids = [token for sequence in sequences for token in sequence]
    lengths = [len(sequence) for sequence in sequences]
    return {"input_ids": ids, "loss_mask": mask or [1] * len(ids), "seq_lengths": lengths, "bucket": 16}


def test_a_batch_has_positions_of_each_sequence_and_no_label_on_its_first_token():
    batch = PackedCollator(padding=2)([packed_row(THREE[:2], [0, 0, 1, 1, 1, 1, 0, 1]), packed_row(THREE[2:])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 6, 11], [12, 13, 14, 15, 2, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, 7, 8, 9, no, no, 11], [no, 13, 14, 15, no, no, no, no]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]
    whole = PackedCollator(padding=2, whole=True)([packed_row(THREE[:2])])
    assert whole["input_ids"].shape == (1, 16)


def test_the_mask_of_a_batch_comes_from_lengths_whatever_the_ids():
    batch = PackedCollator(padding=0)([packed_row([[0, 0, 0], [0, 0]]), packed_row([[0, 0]])])
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [3, 1]


def test_sequences_come_out_of_a_batch_as_they_went_in():
    batch = PackedCollator(padding=2)([packed_row(), packed_row(THREE[1:], [0, 0, 1, 0, 0, 0, 1])])
    sequences, counted = sequences_of(batch)
    assert sequences == [*map(list, THREE), *map(list, THREE[1:])]
    assert counted == [[1, 2, 3, 4], [1, 2], [1, 2, 3], [2], [3]]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "shared_prefix"])
def test_packed_logits_are_those_of_unpacked_sequences(attention, tiny_teacher):
    model = load_policy(tiny_teacher, attn_implementation=attention).eval()
    batch = PackedCollator(padding=2)([packed_row(), packed_row(THREE[2:])])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0] for sequence in THREE]
    found = [packed[0, :5], packed[0, 5:8], packed[0, 8:12], packed[1, :4]]
    for mine, theirs in zip(found, [*alone, alone[2]], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_packed_log_probs_are_those_of_unpacked_sequences(tiny_teacher):
    model = load_policy(tiny_teacher).eval()
    sequences, counted = sequences_of(PackedCollator(padding=2)([packed_row()]))
    plain = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    with torch.no_grad():
        packed, _ = token_log_probs(model, sequences, counted, token_budget=64)
        for ids, found in zip(THREE, packed, strict=True):
            log_probs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = log_probs[:-1].gather(-1, torch.tensor(ids)[1:, None]).flatten()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_teacher):
    """A preparation of short conversations, in the tiny model's own tokens."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    rows = [
        {"question": f"{a} + {a}?", "solution": f"{2 * a}!", "reasoning_trace": f"twice {a}. " * (a % 7)}
        for a in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    keys = {"stages": ["read", "split", "write", "tokens", "pack"], "tokenizer": tiny_teacher, "pack_length": 256}
    prepare_whole(settings(tmp_path, engine_tasks=2, validation_share=0.2, **keys))
    return tmp_path / "out"


SFT = [
    "run_cfg=student_sft_tiny",
    "report_to=null",
    "bf16=false",
    "train_batch_size=2",
    "per_device_train_batch_size=2",
]


def test_the_loss_and_its_gradients_are_those_of_unpacked_rows(prepared, tiny_teacher, tmp_path):
    overrides = [f"model_name_or_path={tiny_teacher}", f"dataset_id_or_path={prepared}"]
    trainer, _ = build(SFT, tmp_path / "run", *overrides, "max_steps=1")
    packed = next(iter(DataLoader(trainer.train_dataset, batch_size=99, collate_fn=trainer.data_collator)))
    tokens = [one for path in sorted((prepared / TOKENS).glob("train-*")) for one in read_arrays(path)]
    width = max(one["length"] for one in tokens)
    unpacked = {name: torch.full((len(tokens), width), fill) for name, fill in (("input_ids", 2), ("labels", IGNORED))}
    unpacked["attention_mask"] = torch.zeros(len(tokens), width, dtype=torch.long)
    for number, one in enumerate(tokens):
        ids, mask = (torch.tensor(one[name].tolist()) for name in ("input_ids", "loss_mask"))
        unpacked["input_ids"][number, : len(ids)] = ids
        unpacked["labels"][number, : len(ids)] = torch.where(mask == 1, ids, IGNORED)
        unpacked["attention_mask"][number, : len(ids)] = 1
    counts = [(batch["labels"] != IGNORED).sum() for batch in (packed, unpacked)]
    assert counts[0] == counts[1] == sum(one["loss_mask"].sum() for one in tokens)
    found = []
    for batch in (packed, unpacked):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts[0])
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-5, rtol=1e-5)


def test_a_run_on_packed_rows_trains_evaluates_and_goes_on(prepared, tiny_teacher, tmp_path):
    overrides = [f"model_name_or_path={tiny_teacher}", f"dataset_id_or_path={prepared}", "eval_size=2", "eval_steps=1"]
    overrides += ["learning_rate=1e-3", "save_steps=1"]
    trainer, _ = build(SFT, tmp_path / "run", *overrides, "max_steps=2")
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[1] < losses[0]
    again, _ = build(SFT, tmp_path / "run", *overrides, "max_steps=3")
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert again.state.global_step == 3


@pytest.mark.parametrize("learner", ["teacher", "student"])
def test_tokens_as_a_teachers_or_students_are_those_of_its_run_on_the_same_rows(learner, tiny_teacher, tmp_path):
    rows = [{"question": f"{a}?", "solution": f"{a}!", "reasoning_trace": f"so {a} " * (a % 3)} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    keys = {
        "stages": ["read", "write", "tokens", "pack"],
        "tokenizer": tiny_teacher,
        "tokens_as": learner,
        "pack_length": 512,
    }
    results = prepare_whole(settings(tmp_path, engine_tasks=1, **keys))
    assert dict(results[2].counts.dropped) == {"no reasoning_trace": 4}
    run = f"run_cfg={'teacher_sft_tiny' if learner == 'teacher' else 'student_sft_tiny'}"
    config = config_of(run, f"model_name_or_path={tiny_teacher}", f"dataset_id_or_path={tmp_path}/out")
    style, tokenizer = load_format("stratos"), load_tokenizer(tiny_teacher)
    wanted = sft_examples(typed_settings(config), load_rows(str(tmp_path / "out")).rows, tokenizer, style)
    found = list(read_arrays(array_file(tmp_path / "out" / TOKENS, "train", 0)))
    assert [one["input_ids"].tolist() for one in found] == [one["input_ids"] for one in wanted]
    assert [one["loss_mask"].tolist() for one in found] == [one["completion_mask"] for one in wanted]
    trainer, _ = build([run, *SFT[1:]], tmp_path / "run", f"model_name_or_path={tiny_teacher}",
                       f"dataset_id_or_path={tmp_path}/out", "eval_size=0", "eval_steps=null", "max_steps=1",
                       "load_best_model_at_end=false")  # fmt: skip
    batches = DataLoader(trainer.train_dataset, batch_size=1, collate_fn=trainer.data_collator)
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in batches) == sum(
        sum(one["completion_mask"]) for one in wanted
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_cfg=student_distill_tiny", "eval_answers=2"], "which hold no questions"),
        (["eval_dataset_id_or_path=reasoning_gym/gcd", "eval_size=2", "eval_steps=1"], "hold out some of their own"),
        (["max_length=100"], "max_length=100: the packed rows of"),
        (["model_name_or_path=embedded/smollm2-135m-instruct", "dataset_id_or_path=OTHER"], "has another vocabulary"),
    ],
)
def test_what_packed_rows_cannot_do_is_refused(overrides, message, prepared, tiny_teacher, tmp_path):
    if "dataset_id_or_path=OTHER" in overrides:
        write_texts(tmp_path, 20)
        prepare_whole(settings(tmp_path, output_dir=str(tmp_path / "other"), **PACKING))
    given = [f"model_name_or_path={tiny_teacher}", f"dataset_id_or_path={prepared}", *overrides]
    with pytest.raises(Refused, match=message):
        build(SFT, tmp_path / "run", *(word.replace("OTHER", str(tmp_path / "other")) for word in given))


def test_the_entropy_of_unigrams_is_that_of_the_trained_tokens(prepared):
    files = packed_files(prepared, "train")
    tokens = [one for path in files for one in read_arrays(path)]
    counts = numpy.bincount(numpy.concatenate([one["input_ids"][one["loss_mask"] == 1] for one in tokens]))
    shares = counts[counts > 0] / counts.sum()
    assert unigram_entropy(files) == pytest.approx(-(shares * numpy.log(shares)).sum())


def test_rows_made_for_the_models_tokenizer_are_taken(prepared, tiny_teacher):
    check_made_for(packed_files(prepared, "train"), load_tokenizer(tiny_teacher), 256)


def test_a_dataset_of_packed_rows_keeps_their_order_and_numbers(prepared, tmp_path):
    from trainers.packed import packed_rows

    files = packed_files(prepared, "train")
    rows = packed_rows(files, tmp_path / "cache")
    assert isinstance(rows, Dataset)
    wanted = [one["input_ids"].tolist() for path in files for one in read_arrays(path)]
    assert [one["input_ids"].tolist() for one in rows] == wanted
