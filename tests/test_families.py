"""Tiny random models of the families of 2026 on packed rows, against one row at a time through transformers' own code.

Sequences share a beginning that is longer than the sliding window, branch inside it and behind it, and some of them end
where others go on.
"""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Olmo3Config,
    OlmoHybridConfig,
    PhimoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from rlt.logprobs import token_log_probs
from rlt.logprobs.engine import _say_how_it_reads
from rlt.models.attention import NAME
from rlt.models.recurrent import past_adapters
from rlt.models.sharing import way_of_reading

VOCABULARY = 61
WINDOW = 6
SPREAD = 0.15  # of the weights: what a layer looks at counts in the log-probs
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ADAPTED = ["q_proj", "v_proj", "o_proj", "in_proj", "in_proj_qkv"]  # PEFT refuses all layers of Nemotron-H
FAMILIES = {
    "Qwen3": ("tree", Qwen3Config(**SHAPE)),
    "Qwen3, experts": ("tree", Qwen3MoeConfig(**SHAPE, **EXPERTS)),
    "SmolLM3": ("tree", SmolLM3Config(**SHAPE)),
    "Llama 3.2": (
        "tree",
        LlamaConfig(
            **SHAPE,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "Mistral": ("tree", MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "Gemma 2": ("tree", Gemma2Config(**{**SHAPE, **WINDOWS}, query_pre_attn_scalar=12, attn_logit_softcapping=0.5)),
    "Gemma 4": (
        "tree",
        Gemma4TextConfig(**SHAPE, **WINDOWS, hidden_size_per_layer_input=0, global_head_dim=16),
    ),
    "Gemma 3": ("tree", Gemma3TextConfig(**SHAPE, **WINDOWS, query_pre_attn_scalar=12, final_logit_softcapping=0.5)),
    "gpt-oss": ("tree", GptOssConfig(**SHAPE, **WINDOWS, num_local_experts=4, num_experts_per_tok=2)),
    "Olmo 3": ("tree", Olmo3Config(**SHAPE, **WINDOWS)),
    "Qwen3.5": ("tree and rows", Qwen3_5TextConfig(**SHAPE, **DELTA)),
    "Qwen3.5, experts": (
        "tree and rows",
        Qwen3_5MoeTextConfig(**SHAPE, **DELTA, **EXPERTS, shared_expert_intermediate_size=24),
    ),
    "Qwen3-Next": (
        "tree and rows",
        Qwen3NextConfig(**SHAPE, **DELTA, **EXPERTS, shared_expert_intermediate_size=24),
    ),
    "Olmo Hybrid": (
        "tree and rows",
        OlmoHybridConfig(**{key: value for key, value in SHAPE.items() if key != "head_dim"}, **DELTA),
    ),
    "Bamba": (
        "tree and rows",
        BambaConfig(
            **{key: value for key, value in SHAPE.items() if key != "head_dim"}, **MAMBA, attn_layer_indices=[1]
        ),
    ),
    "Nemotron-H": (
        "tree and rows",
        NemotronHConfig(
            **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
        ),
    ),
    "Granite 4": (
        "tree and rows",
        GraniteMoeHybridConfig(
            **{key: value for key, value in SHAPE.items() if key != "head_dim"},
            **MAMBA,
            layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=24,
            logits_scaling=2.0,
        ),
    ),
}


def tiny_model(config, attention: str):
    """Random, with norms, biases and sinks that are not what they are at initialisation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(len(parameter))
        else:
            parameter.data = SPREAD * torch.randn(parameter.shape)
    return model


def sequences_and_counted():
    torch.manual_seed(1)
    prompt = torch.randint(3, VOCABULARY, (2 * WINDOW + 5,)).tolist()
    own = torch.randint(3, VOCABULARY, (40,)).tolist()
    first = prompt + own[:14]
    sequences = [
        first,
        first[:-6] + own[14:20],
        prompt + own[20:21],
        first[:-3],
        prompt[:4] + own[21:35],
        first,
        own[35:38],
    ]
    return sequences, [list(range(min(len(ids) - 1, 7), len(ids))) for ids in sequences]


def one_row_at_a_time(model, sequences, counted):
    rows = []
    for ids, where in zip(sequences, counted, strict=True):
        log_probs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        rows.append(torch.stack([log_probs_TV[i - 1, ids[i]] for i in where]))
    return torch.cat(rows)


def gradients(model, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    log_probs.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, stock, tolerance: float) -> None:
    """Log-probs one by one, gradients by the norm of all of them."""
    sequences, counted = sequences_and_counted()
    ours = torch.cat(token_log_probs(model, sequences, counted, token_budget=100)[0])
    expected = one_row_at_a_time(stock, sequences, counted)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)
    found, wanted = gradients(model, ours), gradients(stock, expected)
    assert found.keys() == wanted.keys()
    found, wanted = (torch.cat([grads[key].flatten() for key in grads]) for grads in (found, wanted))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_its_way_and_equals_one_row_at_a_time(name):
    way, config = FAMILIES[name]
    model = tiny_model(config, NAME)
    assert way_of_reading(model).way == way
    compare(model, tiny_model(config, "eager"), 1e-5)


@pytest.fixture
def float64_everywhere(monkeypatch):
    """transformers computes norms, rotary positions and recurrences in float32 by name, which hides all beyond 1e-6."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_float64_throughout_a_family_differs_in_the_last_digits_only(name, float64_everywhere):
    models = [tiny_model(FAMILIES[name][1], attention).double() for attention in (NAME, "eager")]
    for model in models:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    compare(*models, 1e-9)


def log_probs_of(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(token_log_probs(model, *sequences_and_counted(), token_budget=100)[0])


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        ("Mistral", "sliding_window", 100),
        ("Gemma 2", "sliding_window", 100),
        ("Gemma 3", "sliding_window", 100),
        ("gpt-oss", "sliding_window", 100),
        ("Olmo 3", "sliding_window", 100),
        ("Gemma 2", "attn_logit_softcapping", None),
        ("Gemma 3", "final_logit_softcapping", None),
        ("Gemma 3", "query_pre_attn_scalar", 48),
    ],
)
def test_what_a_family_has_of_its_own_counts_in_these_tests(name, key, other):
    config = deepcopy(FAMILIES[name][1])
    before = log_probs_of(tiny_model(config, NAME))
    setattr(config, key, other)
    assert (log_probs_of(tiny_model(config, NAME)) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "mixers"), [("Nemotron-H", 2), ("Bamba", 3), ("Granite 4", 3), ("Qwen3.5", 0)])
def test_no_adapter_lies_where_a_fused_kernel_reads_past_it(name, mixers):
    model = tiny_model(FAMILIES[name][1], NAME)
    left_out = past_adapters(model)
    adapter = LoraConfig(target_modules="all-linear", exclude_modules=left_out or None, task_type="CAUSAL_LM")
    adapted = [name for name, _ in get_peft_model(model, adapter).named_parameters() if "lora_A" in name]
    assert len(left_out) == mixers
    assert any("out_proj" in name for name in adapted) == (mixers == 0)
    assert any("in_proj" in name for name in adapted)


def test_sinks_count_in_these_tests():
    model = tiny_model(FAMILIES["gpt-oss"][1], NAME)
    before = log_probs_of(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-100.0)
    assert (log_probs_of(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "gpt-oss", "Qwen3.5", "Granite 4"])
def test_without_a_packed_row_a_model_reads_and_writes_as_with_eager_attention(name):
    models = [tiny_model(FAMILIES[name][1], attention) for attention in (NAME, "eager")]
    log_probs_of(models[0])  # so that recurrent layers have been told of packed rows
    ids = torch.randint(3, VOCABULARY, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        ours, stock = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in models)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ours, stock = (model.generate(ids, **options) for model in models)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("name", ["Gemma 3", "gpt-oss", "Qwen3.5", "Nemotron-H", "Granite 4"])
def test_checkpointing_adapters_and_copies_change_no_gradient(name):
    model = tiny_model(FAMILIES[name][1], NAME)
    log_probs_of(model)
    model = get_peft_model(deepcopy(model), LoraConfig(target_modules=ADAPTED, init_lora_weights=False))
    sequences, counted = sequences_and_counted()

    def trained() -> dict[str, torch.Tensor]:
        return gradients(model, torch.cat(token_log_probs(model, sequences, counted, token_budget=100)[0]))

    plain = trained()
    model.train()
    model.gradient_checkpointing_enable()
    checkpointed = trained()
    assert plain.keys() == checkpointed.keys() and all("lora" in name for name in plain)
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "told", "reason"),
    [
        ("Qwen3.5", "in part", "its recurrent layers read each sequence from its first token"),
        ("Qwen3", "", ""),
    ],
)
def test_the_way_is_said_once(name, told, reason, caplog):
    _say_how_it_reads.cache_clear()
    with caplog.at_level("INFO", logger="rlt"):
        model = tiny_model(FAMILIES[name][1], NAME)
        log_probs_of(model), log_probs_of(model)
    said = [record.getMessage() for record in caplog.records if record.name == "rlt"]
    assert len(said) == bool(told)
    assert all(told in line and reason in line for line in said)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SHAPE, attention_dropout=0.1), "dropout of 0.1"),
        (Gemma3TextConfig(**SHAPE, **WINDOWS, use_bidirectional_attention=True), "looks ahead"),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2), "layers of kind conv"),
        (PhimoeConfig(**SHAPE, sliding_window=WINDOW), "a sliding window that its attention is not told of"),
    ],
    ids=["dropout", "bidirectional", "convolutions", "a hidden window"],
)
def test_a_model_that_reads_padded_rows_has_a_reason(config, reason):
    reading = way_of_reading(tiny_model(config, NAME))
    assert reading.way == "rows" and reason in reading.reason
