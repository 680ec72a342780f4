"""What draws samples, without a server: the trainer's log-probs, adapters that had to go and come back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EMBEDDED

from backends import AdapterSpec, SharedBase
from backends.create import load_hf_model
from backends.protocol import AdamParams, Datum
from rlt.errors import Refused
from rlt.generation.adapter_engine import KEPT
from rlt.models.paths import resolve_model_path
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import SamplingParams, tensor_of
from rlt.workers.scores import score_prompt
from rlt.workers.torch_sampler import TorchSampler
from rlt.workers.vllm_sampler import VLLMSampler

LIMIT_S = 300
PROMPT = np.array([504, 3575, 282, 4649, 314])


def asked(samples: int = 2, tokens: int = 8, prompt: np.ndarray = PROMPT, **more) -> SampleRequest:
    return SampleRequest("s", 0, prompt, samples, SamplingParams(tokens, 1, []), **more)


def trained(base: SharedBase, name: str, spec: AdapterSpec, vocabulary: int, steps: int = 3):
    """An adapter whose every factor has moved."""
    model = base.create(name, spec).result(LIMIT_S)
    drawn = torch.Generator().manual_seed(spec.seed or 0)
    for _ in range(steps):
        ids = torch.randint(0, vocabulary, (33,), generator=drawn)
        model.forward_backward([Datum(ids[:-1].tolist(), {"target_tokens": ids[1:]})]).result(LIMIT_S)
        model.optim_step(AdamParams(1e-3)).result(LIMIT_S)
    return model


def log_probs_of(model, ids: list[int]) -> np.ndarray:
    datum = Datum(ids[:-1], {"target_tokens": torch.tensor(ids[1:])})
    return model.forward([datum]).result(LIMIT_S).logprobs[0].numpy()


@pytest.mark.slow
def test_samples_and_prompts_of_the_embedded_model_have_the_trainers_log_probs(tmp_path):
    base = SharedBase(load_hf_model(EMBEDDED), tmp_path)
    specs = {"all": AdapterSpec(seed=1), "some": AdapterSpec(rank=8, seed=2, train_attn=False)}
    models = {name: trained(base, name, spec, 49152) for name, spec in specs.items()}
    addresses = {name: str(each.export(tmp_path / f"{name}.peft").result(LIMIT_S)) for name, each in models.items()}
    sampler = VLLMSampler(str(Path(resolve_model_path(EMBEDDED)).absolute()))
    first = {}
    for name, address in addresses.items():
        response = sampler.sample(asked(16, 32, prompt_logprobs=True), address)
        apart, prompt = [], response.prompt_logprobs
        assert prompt is not None and np.isnan(prompt[0])
        for each in response.sequences:
            assert each.logprobs is not None
            read = log_probs_of(models[name], PROMPT.tolist() + each.tokens.tolist())
            apart.append(np.abs(read[len(PROMPT) - 1 :] - each.logprobs))
            assert np.abs(read[: len(PROMPT) - 1] - prompt[1:]).mean() < 2e-4
        assert np.concatenate(apart).mean() < 2e-4
        first[name] = prompt
    base_alone = sampler.sample(asked(prompt_logprobs=True), None).prompt_logprobs
    assert base_alone is not None
    for other in (first["all"], first["some"]):
        assert np.abs(other - base_alone)[1:].mean() > 0.01  # the adapters do change the model
    base.close()


def test_adapters_that_had_to_go_come_back_and_are_taken_for_no_other(tmp_path, tiny_teacher):
    base = SharedBase(load_hf_model(tiny_teacher), tmp_path)
    addresses = []
    for number in range(KEPT + 2):
        model = trained(base, f"m{number}", AdapterSpec(rank=4, seed=number), 100)
        addresses.append(str(model.export(tmp_path / f"{number}.peft").result(LIMIT_S)))
    sampler = VLLMSampler(tiny_teacher)
    before, after = ([sampler.sample(asked(), each).sequences[0] for each in addresses] for _ in range(2))
    for first, second in zip(before, after, strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)
    for first, second in zip(before, before[1:], strict=False):
        assert first.logprobs[0] != second.logprobs[0] or first.tokens[0] != second.tokens[0]
    sampler.forget(addresses[0])
    again = sampler.sample(asked(), addresses[0]).sequences[0]
    assert again.tokens.tolist() == before[0].tokens.tolist()
    with pytest.raises(Refused, match=r"prompt and max_tokens are \d+ tokens"):
        sampler.sample(asked(tokens=sampler.context), None)
    base.close()


def test_adapters_that_nobody_asks_for_any_more_are_let_go(tmp_path, tiny_teacher):
    base, sampler = SharedBase(load_hf_model(tiny_teacher), tmp_path), TorchSampler(tiny_teacher)
    models = [trained(base, name, AdapterSpec(rank=4, seed=1), 100) for name in "ab"]
    addresses = [str(each.export(tmp_path / f"{each.name}.peft").result(LIMIT_S)) for each in models]
    before = [sampler.sample(asked(), each).sequences[0].tokens.tolist() for each in (None, *addresses)]
    for address in addresses:
        sampler.forget(address)
    with sampler.model.weights(None) as model:
        assert not any("lora" in name for name, _ in model.named_modules())
    assert [sampler.sample(asked(), each).sequences[0].tokens.tolist() for each in (None, *addresses)] == before
    base.close()


def test_tables_of_a_long_prompt_are_those_of_the_whole_logits(tiny_teacher, monkeypatch):
    monkeypatch.setattr("rlt.logprobs.head.HEAD_CHUNK_ELEMENTS", 3 * 49152)  # three positions at a time
    prompt = np.arange(5, 25)
    request = asked(prompt=prompt, best_of_prompt=4, prompt_logprobs=True, targets=tensor_of([[7, -1]] * 19))
    with TorchSampler(tiny_teacher).model.weights(None) as model:
        scores = score_prompt(model, request)
        logits = model(torch.tensor(prompt[None])).logits[0, :-1].log_softmax(-1)
    values, ids = logits.topk(4)
    assert scores.best is not None and scores.targets is not None and scores.log_probs is not None
    assert scores.best.token_ids[1:].tolist() == ids.tolist()
    assert scores.best.logprobs[1:] == pytest.approx(values.numpy(), abs=1e-5)
    assert scores.log_probs[1:] == pytest.approx(logits.gather(1, torch.tensor(prompt[1:, None]))[:, 0], abs=1e-5)
    assert scores.targets.values[:, 0] == pytest.approx(logits[:, 7].numpy(), abs=1e-5)
    assert not scores.targets.values[:, 1].any()
