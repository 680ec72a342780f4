"""Packed log-probs against one row at a time, the oracle."""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import spawn_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from trl.kernels import ChunkedLogProbFunction
from trl.models.utils import _ForwardRedirection

from rlt.logprobs import token_log_probs
from rlt.logprobs.engine import _counted_log_probs
from rlt.logprobs.head import _LinearHead
from rlt.logprobs.packing import common_prefix, fill_rows, lay_out
from rlt.models.attention import NAME
from rlt.models.sharing import way_of_reading

VOCABULARY = 53


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **{"attn_implementation": NAME, **options})).double().eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def one_row_at_a_time(model, sequences, counted, temperature):
    """The oracle: plain forward passes without packing, masks or chunks."""
    rows = []
    for ids, where in zip(sequences, counted, strict=True):
        log_probs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0] / temperature, dim=-1)
        rows.append(torch.stack([log_probs_TV[i - 1, ids[i]] for i in where]) if where else torch.zeros(0))
    return rows


def trees(depth: int = 3):
    """Sequences that share beginnings of beginnings, some of them equal and some the beginning of another."""
    own = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)
    if not depth:
        return own.map(lambda ids: [ids])
    below = st.lists(trees(depth - 1), min_size=1, max_size=3).map(lambda parts: sum(parts, []))
    return st.tuples(own, below).map(lambda tree: [tree[0] + rest for rest in tree[1]])


@settings(max_examples=25, deadline=None)
@given(sequences=trees(), budget=st.integers(1, 80), data=st.data())
def test_random_trees_of_sequences_equal_one_row_at_a_time(model, sequences, budget, data):
    sequences = [ids for ids in data.draw(st.permutations(sequences)) if ids]
    counted = [data.draw(st.sets(st.integers(1, len(s) - 1)).map(sorted)) if len(s) > 1 else [] for s in sequences]
    ours, _ = token_log_probs(model, sequences, counted, temperature=0.7, token_budget=budget)
    assert len(ours) == len(sequences)
    for a, b in zip(ours, one_row_at_a_time(model, sequences, counted, 0.7), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-9, rtol=0)


def test_sequences_of_one_pass_may_have_temperatures_of_their_own(model):
    sequences = group_of_three()
    counted = [list(range(8, len(s))) for s in sequences]
    temperatures = [0.7, 1.3, 0.7]
    ours, _ = token_log_probs(model, sequences, counted, temperature=temperatures, token_budget=64)
    for row, temperature in enumerate(temperatures):
        expected = one_row_at_a_time(model, sequences, counted, temperature)[row]
        torch.testing.assert_close(ours[row], expected, atol=1e-9, rtol=0)


def test_without_a_budget_a_pass_has_the_tokens_of_the_longest_sequence(model, monkeypatch):
    sequences, lengths = group_of_three(), []
    counted = [list(range(8, len(s))) for s in sequences]
    trunk = type(model.model).forward
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, *a, **k: lengths.append(k["input_ids"].numel()) or trunk(self, *a, **k),
    )
    ours, _ = token_log_probs(model, sequences, counted, token_budget=None)
    assert max(lengths) <= len(sequences[0])
    monkeypatch.undo()
    for a, b in zip(ours, one_row_at_a_time(model, sequences, counted, 1.0), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_head_with_a_bias_is_scaled_as_the_model_scales_it():
    """Cohere multiplies its logits; with entropies that have gradients the plain head computes them."""
    torch.manual_seed(0)
    config = CohereConfig(**SHAPE, attn_implementation=NAME, logit_scale=0.5, tie_word_embeddings=False)
    model = CohereForCausalLM(config).double().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, dtype=torch.double))
    sequences = group_of_three()
    counted = [list(range(8, len(s))) for s in sequences]

    def gradients(log_probs):
        model.zero_grad()
        torch.cat(log_probs).square().sum().backward()
        return model.lm_head.bias.grad.clone()

    options = {"temperature": 0.7, "token_budget": 64}
    plain, _ = token_log_probs(model, sequences, counted, entropy="with_grad", **options)
    ours, expected = gradients(plain), one_row_at_a_time(model, sequences, counted, 0.7)
    for a, b in zip(plain, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(ours, gradients(expected), atol=1e-6, rtol=1e-6)


def test_gradients_of_what_several_want_are_the_same_to_the_last_bit_each_time():
    """float32, two threads, the embedded model's sizes: 4,096 log-probs of 256 places."""
    threads, hidden_size, vocabulary = torch.get_num_threads(), 576, 512
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "vocab_size": vocabulary, "hidden_size": hidden_size})
    model = LlamaForCausalLM(config)
    hidden_BTH = torch.randn(2, 1024, hidden_size, requires_grad=True)
    places = torch.randint(0, 128, (4096,)).tolist()
    sequences = torch.randint(0, vocabulary, (4096, 1)).tolist()
    wanted = [(number % 2, place, number, 0) for number, place in enumerate(places)]
    upstream = torch.randn(4096)

    def gradient() -> torch.Tensor:
        values, _ = _counted_log_probs(model, wanted, sequences, [1.0] * 4096, "none", hidden_BTH)
        return torch.autograd.grad((values * upstream).sum(), hidden_BTH)[0]

    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


def group_of_three(offset=0):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    return [prompt + [(5 + offset + i) % VOCABULARY for i in range(n)] for n in (6, 3, 1)]


def gradients(model, log_probs):
    model.zero_grad()
    torch.cat(log_probs).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def variants():
    yield "plain", llama()
    yield "tied embeddings", llama(tie_word_embeddings=True)
    checkpointed = llama().train()
    checkpointed.gradient_checkpointing_enable()
    yield "gradient checkpointing", checkpointed
    adapter = get_peft_model(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).double()
    yield "LoRA", adapter
    yield "no sharing", llama(attn_implementation="sdpa")


@pytest.mark.parametrize(("name", "variant"), variants(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("chunk", [2**26, 2 * VOCABULARY], ids=["one chunk", "chunks of two positions"])
def test_gradients_equal_one_row_at_a_time(name, variant, chunk, monkeypatch):
    equal = group_of_three()[0]
    sequences = [*group_of_three(), *group_of_three(offset=7), equal, equal[:11], [5, 6, 7]]
    counted = [list(range(8, len(s))) for s in sequences[:-1]] + [[2]]
    expected = gradients(variant, one_row_at_a_time(variant, sequences, counted, 1.0))
    monkeypatch.setattr("rlt.logprobs.head.HEAD_CHUNK_ELEMENTS", chunk)
    ours = gradients(variant, token_log_probs(variant, sequences, counted, token_budget=40)[0])
    for a, b in zip(ours, expected, strict=True):
        # RMSNorm computes in float32 in transformers, which bounds what float64 can show.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_passes_that_other_ranks_make_alone_change_nothing(model):
    sequences = group_of_three()
    counted = [list(range(8, len(s))) for s in sequences]
    alone = token_log_probs(model, sequences, counted, token_budget=64)[0]
    expected = gradients(model, alone)
    asked = []
    together = token_log_probs(
        model, sequences, counted, token_budget=64, agree_on_forwards=lambda n: asked.append(n) or n + 2
    )[0]
    assert asked == [1]
    assert torch.equal(torch.cat(together), torch.cat(alone))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, together), expected, strict=True))


def other_architectures():
    yield MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2))


@pytest.mark.parametrize("other", other_architectures(), ids=["state space"])
def test_models_that_look_elsewhere_share_nothing_and_say_so_once(other, caplog):
    other = other.double().eval()
    assert way_of_reading(other).way == "rows"
    sequences = group_of_three()
    counted = [list(range(8, len(s))) for s in sequences]
    for _ in range(2):
        ours, _ = token_log_probs(other, sequences, counted, token_budget=64)
    for a, b in zip(ours, one_row_at_a_time(other, sequences, counted, 1.0), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-6, rtol=0)
    said = [record.getMessage() for record in caplog.records if record.name == "rlt"]
    assert [line.split()[0] for line in said] == [type(other).__name__]


def test_entropies_are_those_of_the_softmax(model):
    sequences = group_of_three()
    counted = [[8], [9], [8]]
    _, entropies = token_log_probs(model, sequences, counted, temperature=0.5, token_budget=64, entropy="value")
    for ids, where, ours in zip(sequences, counted, entropies, strict=True):
        probs = torch.softmax(model(torch.tensor([ids])).logits[0, where[0] - 1] / 0.5, dim=-1)
        assert ours.item() == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-9)


def test_the_head_is_trls_kernel_in_numbers():
    """Log-probs, entropies and gradients against the one that a GPU uses, in its plain form."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(VOCABULARY, 16, requires_grad=True)
    bias, targets, upstream = torch.randn(VOCABULARY, requires_grad=True), torch.arange(7), torch.randn(7)
    found = []
    for apply in (
        lambda: _LinearHead.apply(hidden, weight, bias, targets, 1 / 0.7, 3, "value"),
        lambda: ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 20, None, 1.0, ("entropy",))[:2],
    ):
        log_probs, entropies = apply()
        gradients_of = torch.autograd.grad((log_probs * upstream).sum(), (hidden, weight, bias))
        found.append([log_probs, entropies, *gradients_of])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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
    ours, _ = token_log_probs(capped, sequences, counted, token_budget=64)
    torch.testing.assert_close(ours[0], one_row_at_a_time(capped, sequences, counted, 1.0)[0], atol=1e-6, rtol=0)


def test_what_sequences_begin_with_is_laid_out_once():
    sequences = [[7, 7, 1, 2, 3], [8], [7, 7, 1, 2, 4, 5], [7, 7, 9], [7, 7, 1, 2, 3], [7, 7, 1]]
    (row,) = fill_rows(sequences, list(range(6)), token_budget=9)
    assert row.members == [5, 0, 4, 2, 3, 1]  # 7 7 1 | 2 3 | - | 4 5 | 9 | 8
    assert row.shared == [0, 3, 5, 4, 2, 0]
    counted = [[4], [], [4, 5], [2], [4], [1, 2]]
    inputs, places = lay_out(row, sequences, counted, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[7, 7, 1, 2, 3, 4, 5, 9, 8]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 5, 2, 0]]
    assert places == [0, 1, 3, 3, 3, 5, 1]
    rule = inputs["layout"].may_look(torch.device("cpu"))
    index = torch.arange(9)
    looks = [keys.nonzero().flatten().tolist() for keys in rule(0, 0, index[:, None], index[None, :])]
    path = [0, 1, 2, 3]
    assert looks == [[0], [0, 1], [0, 1, 2], path, [*path, 4], [*path, 5], [*path, 5, 6], [0, 1, 7], [8]]


def test_rows_stay_within_the_budget_and_keep_together_what_shares():
    sequences = [[1, 1, 1, 1, 2], [5, 5, 5], [1, 1, 1, 1, 3, 3], [5, 5, 6, 6], [9] * 12]
    rows = fill_rows(sequences, list(range(5)), token_budget=8)
    assert [row.members for row in rows] == [[0, 2], [1, 3], [4]]
    assert [row.length for row in rows] == [7, 5, 12]  # a sequence longer than the budget passes alone
    assert [row.members for row in fill_rows(sequences, [0, 1, 3], token_budget=8)] == [[0, 1], [3]]


def test_the_budget_of_recurrent_layers_is_of_whole_padded_sequences():
    sequences = [[1, 1, 1, 2], [1, 1, 1, 3, 3, 3], [1, 1, 1, 4]]
    assert [row.members for row in fill_rows(sequences, [0, 1, 2], token_budget=12)] == [[0, 1, 2]]
    assert [row.members for row in fill_rows(sequences, [0, 1, 2], token_budget=12, whole=True)] == [[0, 1], [2]]


def test_common_prefixes():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


def gradients_of_rank(rank: int, folder: str) -> None:
    """One of two processes, each with sequences of its own; budget 14 makes two forward passes of one backward."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = llama()
    wrapped = DistributedDataParallel(model)
    sequences = group_of_three(offset=7 * rank)
    counted = [list(range(8, len(s))) for s in sequences]
    compute = partial(token_log_probs, model, sequences, counted, token_budget=14)
    log_probs, _ = _ForwardRedirection()(wrapped, model, compute)
    torch.save(gradients(model, log_probs), f"{folder}/{rank}.pt")
    # Were the wrapper the last to hold the group, it would wait for gloo's thread with the GIL that the thread wants.
    del wrapped
    dist.destroy_process_group()


def test_gradients_are_averaged_over_processes(model, tmp_path):
    spawn_ranks(gradients_of_rank, (str(tmp_path),))
    expected = []
    for rank in range(2):
        sequences = group_of_three(offset=7 * rank)
        counted = [list(range(8, len(s))) for s in sequences]
        expected.append(gradients(model, one_row_at_a_time(model, sequences, counted, 1.0)))
    for rank in range(2):
        ours = torch.load(tmp_path / f"{rank}.pt")
        for a, b, c in zip(ours, *expected, strict=True):
            torch.testing.assert_close(a, (b + c) / 2, rtol=1e-5, atol=1e-5)
