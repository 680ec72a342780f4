"""Real models behind the server: the numbers of a backend that is used without one, and a sampler that agrees."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EMBEDDED

pytest.importorskip("sqlalchemy")

from test_serving_command import serve  # noqa: E402
from test_serving_sdk import VERSIONS, environment_of  # noqa: E402

from backends.adapters import AdapterSpec, SharedBase  # noqa: E402
from backends.protocol import AdamParams as BackendAdamParams  # noqa: E402
from backends.protocol import Datum as BackendDatum  # noqa: E402
from rlt.models.loading import load_policy  # noqa: E402
from rlt.serving.client import Client, RequestFailed, datum  # noqa: E402
from rlt.wire.values import AdamParams, SamplingParams, tensor_of  # noqa: E402

KEY = "tml-aaaaaaaaaaaa"
LIMIT_S = 180
TOKENS = [[5, 6, 7, 8], [900, 31], [77, 78, 79]]


@contextlib.contextmanager
def served(folder: Path, *words: str):
    process = serve(folder, *words, key=KEY)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.communicate(timeout=LIMIT_S)
        yield line.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0  # its workers have ended, and it behind them


@pytest.fixture(scope="module")
def client(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("serving") / "state"
    with served(folder, f"base_models=[{tiny_teacher}]") as address, Client(address, KEY) as service:
        yield service


@pytest.fixture(scope="module")
def torch_client(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("serving") / "state"
    words = f"base_models=[{tiny_teacher}]", "sampler=torch", "full_finetuning=true"
    with served(folder, *words) as address, Client(address, KEY) as service:
        yield service


@pytest.fixture(params=["client", "torch_client"], ids=["vllm", "torch"])
def either(request) -> Client:
    """One server that samples by vLLM, and one that does not."""
    return request.getfixturevalue(request.param)


def data(shift: int = 1) -> list:
    return [datum(ids, target_tokens=[i + shift for i in ids], weights=[0.5] * len(ids)) for ids in TOKENS]


def trained(model, steps: int, shift: int = 1) -> list[float]:
    return [model.train_batch(data(shift), "cross_entropy", AdamParams(1e-2))["loss:sum"] for _ in range(steps)]


def test_a_step_gives_the_numbers_of_a_backend_in_process(client, tiny_teacher, tmp_path):
    model = client.create_model(tiny_teacher, rank=4, seed=3)
    base = SharedBase(load_policy(tiny_teacher), tmp_path)
    own = base.create("own", AdapterSpec(rank=4, seed=3)).result(60)
    inputs = [{n: torch.tensor(t.dense()) for n, t in each.loss_inputs.items()} for each in data()]
    batch = [BackendDatum(ids, each) for ids, each in zip(TOKENS, inputs, strict=True)]
    for _ in range(3):
        theirs = model.forward_backward(data(), "cross_entropy").result(LIMIT_S)
        ours = own.forward_backward(batch, "cross_entropy").result(60)
        for row, log_probs, losses in zip(theirs.outputs, ours.logprobs, ours.elementwise_loss, strict=True):
            assert row["logprobs"].tobytes() == log_probs.numpy().tobytes()
            assert row["elementwise_loss"].tobytes() == losses.numpy().tobytes()
        assert theirs.metrics == ours.metrics
        norm = model.optim_step(AdamParams(1e-2)).result(60)["metrics"]["grad_norm"]
        assert norm == own.optim_step(BackendAdamParams(1e-2)).result(60).grad_norm
    base.close()


def test_models_on_one_base_do_not_touch_each_other(client, tiny_teacher):
    alone = trained(client.create_model(tiny_teacher, rank=4, seed=3), 3)
    one, other = (client.create_model(tiny_teacher, rank=rank, seed=3) for rank in (4, 8))
    between = []
    for _ in range(3):
        between += trained(one, 1)
        trained(other, 1, shift=2)
    assert between == alone
    assert alone == sorted(alone, reverse=True)


def test_a_state_goes_on_and_weights_alone_begin_anew(client, tiny_teacher):
    model = client.create_model(tiny_teacher, rank=4, seed=3)
    trained(model, 2)
    path = model.save_state("a").result(60)["path"]
    after = trained(model, 3)
    assert trained(client.model_from_state(path), 3) == after
    cold = trained(client.model_from_state(path, optimizer=False), 3)
    assert cold[0] == after[0]
    assert cold[2] != after[2]
    model.load_state(path).result(60)
    assert trained(model, 3) == after


def test_what_is_refused_leaves_gradients_as_they_were(client, tiny_teacher):
    norms = []
    for faulty in (False, True):
        model = client.create_model(tiny_teacher, rank=4, seed=3)
        model.forward_backward(data(), "cross_entropy").result(60)
        model.forward(data(2), "cross_entropy").result(60)
        if faulty:
            for bad, loss in ((data(10**6), "cross_entropy"), (data(), "ppo"), (data(), "no_loss")):
                with pytest.raises(RequestFailed) as failed:
                    model.forward_backward(bad, loss).result(60)
                assert failed.value.category == "user"
        norms.append(model.optim_step(AdamParams(1e-2)).result(60)["metrics"]["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_samples_have_the_trainers_log_probs(either, tiny_teacher):
    model = either.create_model(tiny_teacher, rank=4, seed=3)
    trained(model, 3)
    sampler = model.save_for_sampling()
    prompt, params = [5, 6, 7], SamplingParams(max_tokens=12, seed=1, stop=[], temperature=0.7)
    response = sampler.sample(prompt, params, num_samples=3, prompt_logprobs=True).result(LIMIT_S)
    again = sampler.sample(prompt, params, num_samples=3).result(60)
    assert len({tuple(each.tokens.tolist()) for each in response.sequences}) == 3
    assert [each.tokens.tolist() for each in again.sequences] == [each.tokens.tolist() for each in response.sequences]
    assert np.isnan(response.prompt_logprobs[0])
    for each in response.sequences:
        ids = prompt + each.tokens.tolist()
        (read,) = model.forward([datum(ids[:-1], target_tokens=ids[1:])], "cross_entropy").result(60).outputs
        assert np.abs(read["logprobs"][2:] - each.logprobs).mean() < 2e-4
        assert np.abs(read["logprobs"][:2] - response.prompt_logprobs[1:]).mean() < 2e-4
    frozen = sampler.compute_logprobs(prompt).result(60).prompt_logprobs
    trained(model, 2)
    assert sampler.compute_logprobs(prompt).result(60).prompt_logprobs[1:].tolist() == frozen[1:].tolist()
    base = either.sampler(base_model=tiny_teacher).compute_logprobs(prompt).result(60).prompt_logprobs
    assert np.abs(base[1:] - frozen[1:]).max() > 1e-3
    new = either.create_model(tiny_teacher, rank=4, seed=9)  # adds nothing yet
    untrained = new.forward([datum(prompt[:-1], target_tokens=prompt[1:])], "cross_entropy").result(60)
    assert np.abs(untrained.outputs[0]["logprobs"] - base[1:]).max() < 1e-4


def test_a_sample_ends_where_it_was_told_to(either, tiny_teacher, tokenizer):
    sampler = either.sampler(base_model=tiny_teacher)

    def tokens(**named) -> tuple[list[int], str]:
        asked = SamplingParams(**({"max_tokens": 10, "seed": 4, "stop": []} | named))
        (each,) = sampler.sample([5, 6, 7], asked).result(LIMIT_S).sequences
        assert each.logprobs.size == each.tokens.size
        return each.tokens.tolist(), each.stop_reason

    free, reason = tokens()
    assert (len(free), reason) == (10, "length")
    assert tokens(stop=[free[4]]) == (free[: free.index(free[4]) + 1], "stop")
    text = tokenizer.decode(free[3:5])
    cut, reason = tokens(stop=text)
    assert reason == "stop"
    assert text in tokenizer.decode(cut)
    assert text not in tokenizer.decode(cut[:-1])
    assert cut == free[: len(cut)]
    greedy = tokens(temperature=0)[0]
    assert tokens(top_k=1)[0] == tokens(top_p=1e-6)[0] == greedy


def test_best_tokens_and_given_tokens_have_log_probs(either, tiny_teacher):
    sampler, prompt = either.sampler(base_model=tiny_teacher), [5, 6, 7]
    asked = {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 2}
    targets = tensor_of([[6, -1], [7, 9]])
    form = {"data": targets.values.ravel().tolist(), "dtype": "int64", "shape": [2, 2]}
    params = SamplingParams(max_tokens=4, temperature=0, stop=[])
    response = sampler.sample(prompt, params, target_prompt_logprobs=form, **asked).result(LIMIT_S)
    assert response.best_of_prompt.logprobs.shape == (3, 3)
    assert (response.best_of_prompt.logprobs[0] == -99999.0).all()
    assert (np.diff(response.best_of_prompt.logprobs[1:]) <= 0).all()
    given = response.target_prompt_logprobs.dense()
    assert given[:, 0] == pytest.approx(response.prompt_logprobs[1:], abs=1e-4)
    assert given[0, 1] == 0.0
    sparse = {"data": [7, 9], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 0, 2]}
    sparse |= {"sparse_col_indices": [0, 2]}
    few = sampler.sample(prompt, params, target_prompt_logprobs=sparse).result(60).target_prompt_logprobs
    assert (few.row_starts.tolist(), few.columns.tolist()) == ([0, 0, 2], [0, 2])
    assert few.values == pytest.approx(given[1], abs=1e-4)
    (each,) = response.sequences
    assert each.best.token_ids[:, 0].tolist() == each.tokens.tolist()
    assert each.best.logprobs[:, 0] == pytest.approx(each.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [([10**6], {}, "1000000"), ([5], {"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k")],
)
def test_what_cannot_be_sampled_is_the_clients_fault(client, tiny_teacher, prompt, more, said):
    with pytest.raises(RequestFailed, match=said) as failed:
        client.sampler(base_model=tiny_teacher).sample(prompt, SamplingParams(max_tokens=2), **more).result(LIMIT_S)
    assert failed.value.category == "user"


def test_samples_of_several_models_at_once_are_those_of_each_alone(client, tiny_teacher):
    samplers = [client.sampler(base_model=tiny_teacher)]
    for rank, flags in ((4, {}), (8, {"train_unembed": False}), (100, {})):  # the engine takes no rank of 100
        model = client.create_model(tiny_teacher, rank=rank, seed=rank, **flags)
        trained(model, 3)
        samplers.append(model.save_for_sampling())
    asked = [([5, 6, 7 + i], SamplingParams(max_tokens=10, seed=i, stop=[])) for i in range(4)]
    waiting = [[each.sample(*some, num_samples=2) for some in asked] for each in samplers]
    together = [[answer.result(LIMIT_S).sequences for answer in some] for some in waiting]
    for sampler, some in zip(samplers, together, strict=True):
        for question, sequences in zip(asked, some, strict=True):
            alone = sampler.sample(*question, num_samples=2).result(60).sequences
            assert [each.tokens.tolist() for each in sequences] == [each.tokens.tolist() for each in alone]
    assert len({tuple(some[0][0].tokens.tolist()) for some in together}) > 1


def test_all_weights_are_trained_where_the_server_allows_it(client, torch_client, tiny_teacher, tmp_path):
    with pytest.raises(RequestFailed, match="full_finetuning=true"):
        client.create_model(tiny_teacher, rank=None)
    model = torch_client.create_model(tiny_teacher, rank=None)
    losses = trained(model, 3)
    assert losses == sorted(losses, reverse=True)
    path = model.save_state("a").result(60)["path"]
    sampler = model.save_for_sampling()
    after = trained(model, 2)
    assert trained(torch_client.model_from_state(path), 2) == after
    prompt = [5, 6, 7]
    found = sampler.sample(prompt, SamplingParams(max_tokens=6, seed=1, stop=[])).result(LIMIT_S).sequences[0]
    ids = prompt + found.tokens.tolist()
    frozen = torch_client.model_from_state(path).forward([datum(ids[:-1], target_tokens=ids[1:])], "cross_entropy")
    assert np.abs(frozen.result(60).outputs[0]["logprobs"][2:] - found.logprobs).max() < 1e-4
    assert np.isfinite(model.embeddings([prompt]).result(60)).all()
    files = {path.name for path in model.download(tmp_path / "whole", merged=True).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


SDK_PROGRAM = """
import json, sys, tinker
from tinker import types
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=sys.argv[1], rank=8)
ids = [504, 3575, 282, 4649, 314, 7042, 30]
inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
batch = [types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)]
losses = []
for _ in range(3):
    read = client.forward_backward(batch, "cross_entropy")
    step = client.optim_step(types.AdamParams(learning_rate=1e-3))
    losses.append(read.result().metrics["loss:sum"]); step.result()
sampler = client.save_weights_and_get_sampling_client()
params = types.SamplingParams(max_tokens=5, temperature=0.0)
sample = sampler.sample(types.ModelInput.from_ints(ids[:3]), 1, params).result().sequences[0]
info = client.get_info().model_data
sys.stdout.write(json.dumps([losses, list(sample.tokens), info.tokenizer_id]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_sdk_trains_the_embedded_model_that_is_served_by_default(version, tmp_path):
    with served(tmp_path / "state") as address:
        variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        variables |= {"TINKER_BASE_URL": address, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
        command = [environment_of(version), "-c", SDK_PROGRAM, EMBEDDED]
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses, tokens, folder = json.loads(ended.stdout)
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] - 0.5
    assert 1 <= len(tokens) <= 5
    assert (Path(folder) / "tokenizer.json").is_file()
