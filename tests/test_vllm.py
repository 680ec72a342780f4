"""The real engine in process: agreement of log-probs after a sync, and sampling from seeds alone."""

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm import SamplingParams
from vllm.utils.torch_utils import set_random_seed

from rlt.generation.merging import merged_params
from rlt.generation.vllm_engine import VLLMEngine, groups_of, unchanged_process
from rlt.logprobs import token_log_probs
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_policy, load_tokenizer
from rlt.planning.engine_checks import WHOLE

MODEL = "embedded/smollm2-135m-instruct"
QWEN = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPTS = ["The capital of France is", "One, two, three,", "def add(a, b):"]


@pytest.fixture(scope="module")
def engine_and_model():
    path = str(embedded_model_path(MODEL))
    model = load_policy(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # other weights than the engine could have read from the folder
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    engine = VLLMEngine(
        model=model,
        accelerator=Accelerator(cpu=True),
        processing_class=load_tokenizer(path),
        engine_dtype="float32",
        max_model_length=256,
        max_num_seqs=32,
        temperature=0.7,
        max_completion_length=24,
    )
    engine.sync_weights()
    return engine, model


def encode(engine):
    return [engine.processing_class(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]


def disagreement(engine, model) -> float:
    prompts = encode(engine) * 4
    completions, sampled = engine.generate_seeded(prompts, list(range(len(prompts))))
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    counted = [list(range(len(p), len(s))) for p, s in zip(prompts, sequences, strict=True)]
    with torch.no_grad():
        ours, _ = token_log_probs(model, sequences, counted, temperature=0.7, token_budget=2048)
    return (torch.cat(ours) - torch.tensor([v for row in sampled for v in row])).abs().mean().item()


def test_engine_and_trainer_agree_after_a_sync_and_after_an_update(engine_and_model):
    engine, model = engine_and_model
    assert disagreement(engine, model) < 2e-4
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)  # tied to the input: the copy that can go stale
    assert disagreement(engine, model) > 1e-2
    engine.sync_weights()
    assert disagreement(engine, model) < 2e-4


def test_tokens_that_were_not_sampled_have_log_probs_too(engine_and_model, monkeypatch):
    engine, model = engine_and_model
    monkeypatch.setattr(engine, "top_p", 0.1)  # of what is sampled, not of what is asked for
    sequences = encode(engine)
    ends = [(ids, end) for ids in sequences for end in range(2, len(ids))]
    found = engine.next_token_log_probs([ids[:end] for ids, end in ends], [ids[end] for ids, end in ends])
    counted = [list(range(2, len(ids))) for ids in sequences]
    with torch.no_grad():
        ours, _ = token_log_probs(model, sequences, counted, temperature=0.7, token_budget=64)
    torch.testing.assert_close(torch.tensor(found), torch.cat(ours), atol=1e-3, rtol=0)


def test_completions_follow_from_their_seeds_alone(engine_and_model):
    engine, _ = engine_and_model
    prompts = encode(engine)
    first = engine.generate_seeded(prompts, [1, 2, 3])
    torch.manual_seed(123)
    second = engine.generate_seeded(list(reversed(prompts)), [3, 2, 1])
    assert first[0] == list(reversed(second[0]))
    assert engine.generate_seeded(prompts, [4, 5, 6])[0] != first[0]


def test_prompts_of_more_tokens_than_one_engine_step_takes(engine_and_model):
    engine, _ = engine_and_model
    step = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [list(range(i + 1, i + 231)) for i in range(0, 250 * (step // 230 + 2), 250)]
    completions, _ = engine.generate_seeded(prompts, list(range(len(prompts))), max_tokens=2)
    assert [0 < len(ids) <= 2 for ids in completions] == [True] * len(prompts)


@pytest.mark.parametrize("syncs", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_reaches_the_engine_and_its_base_stays_as_it_was(engine_and_model, dtype, syncs):
    engine, model = engine_and_model
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy = get_peft_model(load_policy(model.name_or_path, dtype=dtype), lora)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    engine.model = policy
    try:
        for _ in range(syncs):
            engine.sync_weights()
        assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
        gap = disagreement(engine, policy.float())
    finally:
        engine.model = model
        engine.sync_weights()
    assert gap < (2e-4 if dtype == torch.float32 else 0.05)


def test_adapters_reductions_end_before_an_engine_of_several_gpus_begins(monkeypatch):
    """What a CPU can show of it: the engine asks for the barrier, on its own device, before it generates."""
    done: list = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: done.append(device_ids))
    monkeypatch.setattr("rlt.generation.vllm_engine.generate", lambda *_: (done.append("generated") or [[7]], [[0.0]]))
    monkeypatch.setattr(VLLMEngine, "_of_the_group", lambda _, prompts, seeds: (prompts, seeds, slice(None)))
    plain = Qwen2ForCausalLM(Qwen2Config(**QWEN))
    for model, expected in ((plain, ["generated"]), (get_peft_model(plain, LoraConfig()), [[3], "generated"])):
        engine = object.__new__(VLLMEngine)
        engine.model, engine.llm, engine.enable_sleep_mode = model, None, False
        engine.accelerator = SimpleNamespace(device=torch.device("cuda", 3), local_process_index=3)
        engine.tensor_parallel_size, engine.generation_kwargs = 2, {}
        engine.temperature, engine.top_p, engine.top_k, engine.min_p, engine.repetition_penalty = 0.7, 1.0, 0, None, 1.0
        done.clear()
        assert engine.generate_seeded([[1]], [0], max_tokens=1) == ([[7]], [[0.0]])
        assert done == expected


def test_merged_weights_are_rounded_once():
    """0.1 in bfloat16 and an update of a third of its spacing: the sum of both in bfloat16 by way of float32."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(torch.bfloat16)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * layer.scaling["default"]
    expected = (layer.base_layer.weight.float() + delta).to(torch.bfloat16)
    assert torch.equal(dict(merged_params(policy))["model.layers.0.self_attn.q_proj.weight"], expected)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_quantised_policy_reaches_the_engine_with_its_adapter(engine_and_model, bits):
    engine, model = engine_and_model
    quantised = load_policy(model.name_or_path, device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    torch.manual_seed(0)
    engine.model = get_peft_model(quantised, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    weights = dict(merged_params(engine.model))
    # Each product, adapter included, is the policy's own, up to what it loses in bfloat16 or to 8-bit activations.
    name, x = "model.layers.3.mlp.down_proj", torch.randn(5, 1536)
    with torch.no_grad():
        product = engine.model.get_base_model().get_submodule(name)(x)
        torch.testing.assert_close(x @ weights[f"{name}.weight"].T, product, atol=0.03 * product.std(), rtol=0.03)
    merged = load_policy(model.name_or_path)
    merged.load_state_dict(weights, strict=False)
    try:
        assert disagreement(engine, merged) > 0.2
        engine.sync_weights()
        assert disagreement(engine, merged) < 2e-4
    finally:
        engine.model = model
        engine.sync_weights()


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_and_layers_without_an_adapter_are_unpacked_too(bits, tmp_path):
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(Qwen2Config(**QWEN))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(".bias"):
                parameter.fill_(100.0)  # beside which a weight is lost when both are added in bfloat16
    plain.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))  # adds nothing yet
    weights = dict(merged_params(policy))
    in_evaluation = dict(merged_params(policy.eval()))
    assert all(torch.equal(weights[name], in_evaluation[name]) for name in weights)
    expected = plain.state_dict()
    assert expected.keys() - {"lm_head.weight"} == weights.keys() - {"lm_head.weight"}
    for name, weight in weights.items():
        lost = (weight - expected[name]).abs().mean() / expected[name].abs().mean()
        assert lost < (0.12 if bits == 4 else 0.01), name


def test_completions_of_one_prompt_differ_and_follow_from_the_seed(engine_and_model):
    engine, _ = engine_and_model
    prompt = encode(engine)[0]
    completions, log_probs = engine.generate_seeded([prompt] * 4, [7, 0, 0, 0])
    assert len({tuple(ids) for ids in completions}) > 1
    assert [len(values) for values in log_probs] == [len(ids) for ids in completions]
    assert engine.generate_seeded([prompt] * 4, [7, 1, 2, 3])[0] == completions


def test_an_engine_leaves_generators_and_precision_of_its_process_alone():
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with unchanged_process():  # what vLLM's workers do
        set_random_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(before[0] + 1)
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_completions_keep_to_a_structure(engine_and_model, monkeypatch):
    engine, _ = engine_and_model
    monkeypatch.setattr(engine, "generation_kwargs", {"structured_outputs": {"choice": ["yes", "no"]}})
    completions, _ = engine.generate_seeded(encode(engine), [1, 2, 3])
    texts = [engine.processing_class.decode(ids, skip_special_tokens=True) for ids in completions]
    assert set(texts) <= {"yes", "no"}


def test_every_option_of_a_request_is_known_to_leave_the_distribution_whole_or_is_refused():
    of_a_request = {field for field in SamplingParams.__struct_fields__ if not field.startswith("_")}
    lengths = {"max_tokens", "stop", "stop_token_ids", "ignore_eos", "repetition_detection"}
    said = {"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"}
    said |= {"output_kind", "output_text_buffer_length", "stream_interval", "skip_clone", "flat_logprobs"}
    said |= {field for field in of_a_request if "logprob" in field} | {"routed_experts_prompt_start"}
    # A watermark is the engine's; the temperature is compared with the run's.
    others = {"n", "seed", "temperature", "watermarking", "skip_reading_prefix_cache"}
    assert of_a_request - WHOLE.keys() == lengths | said | others
    assert WHOLE.keys() - of_a_request == {"logits_processors"}  # of earlier versions


def test_equal_neighbours_share_a_request_unless_it_is_greedy():
    assert groups_of([[1], [1], [2], [1]], 0.7) == [([1], 2), ([2], 1), ([1], 1)]
    assert groups_of([[1], [1], [2]], 0.0) == [([1], 1), ([1], 1), ([2], 1)]


def test_greedy_completions_of_equal_prompts_are_one_and_the_same(engine_and_model, monkeypatch):
    engine, _ = engine_and_model
    monkeypatch.setattr(engine, "temperature", 0.0)
    prompt = encode(engine)[0]
    first, second = engine.generate_seeded([prompt, prompt], [1, 2])[0]
    assert first == second and first


def test_strings_to_stop_at_are_found(engine_and_model, monkeypatch):
    engine, _ = engine_and_model
    prompts = encode(engine)
    whole, _ = engine.generate_seeded(prompts, [1, 2, 3])
    decode = engine.processing_class.decode
    stop = decode(whole[0][4])
    monkeypatch.setattr(engine, "generation_kwargs", {"stop": [stop]})
    short, _ = engine.generate_seeded(prompts[:1], [1])
    assert stop in decode(short[0]) and stop not in decode(short[0][:-1])
    assert short[0] == whole[0][: len(short[0])] and len(short[0]) < len(whole[0])
