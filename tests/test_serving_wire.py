"""Messages of the training API: the bytes that real clients wrote and read, and whatever else may arrive."""

import json
import random

import numpy as np
import pytest

from rlt.errors import Refused
from rlt.wire import json_form, protobuf
from rlt.wire.values import (
    AdamParams,
    BestTokens,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    Limits,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    Tensor,
    tensor_of,
)

REQUEST = bytes.fromhex(
    "0a09733a747261696e3a3010011a440a100a0e0a0c01000000020000000300000012300a0d7461726765745f746f6b656e73121f0a180200"
    "000000000000030000000000000004000000000000001802220103220d63726f73735f656e74726f7079"
)
OUTPUT = bytes.fromhex(
    "0a067363616c6172123a12360a086c6f6770726f6273122a0a0c000080bf000000c0000040c01218000000000000000008000000000000000c"
    "00000000000000180118021a130a086c6f73733a73756d11000000000000f83f"
)
SAMPLE = bytes.fromhex("0a14120805000000020000001a08000000bf000080be12080000c07f000080bf")
SPARSE = Tensor(np.float32([1.0, 0.5, -2.0]), (3, 4), np.array([0, 2, 2, 3]), np.array([0, 3, 1]))


def request(**inputs) -> ForwardBackwardRequest:
    return ForwardBackwardRequest("s:train:0", 1, [Datum(np.array([1, 2, 3]), inputs)], "cross_entropy")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_request_is_written_as_the_client_writes_it():
    assert protobuf.write_request(request(target_tokens=tensor_of([2, 3, 4]))) == REQUEST


def test_a_request_is_read_as_the_client_wrote_it():
    read = protobuf.read_request(REQUEST)
    assert (read.model_id, read.seq_id, read.loss_fn, read.forward_only) == ("s:train:0", 1, "cross_entropy", False)
    assert read.data[0].tokens.tolist() == [1, 2, 3]
    assert read.data[0].loss_inputs["target_tokens"].dense().tolist() == [2, 3, 4]
    assert protobuf.read_place(REQUEST) == ("s:train:0", 1)


def test_an_output_has_the_bytes_that_both_clients_read():
    output = ForwardBackwardOutput([{"logprobs": f32(-1, -2)}, {"logprobs": f32(-3)}], {"loss:sum": 1.5})
    assert protobuf.write_output(output) == OUTPUT
    read = protobuf.read_output(OUTPUT)
    assert [each["logprobs"].tolist() for each in read.outputs] == [[-1, -2], [-3]]
    assert read.metrics == {"loss:sum": 1.5}


def test_a_sample_has_the_bytes_that_both_clients_read():
    response = SampleResponse([SampledSequence(np.array([5, 2]), f32(-0.5, -0.25), "stop")], f32(np.nan, -1))
    assert protobuf.write_sample(response) == SAMPLE
    read = protobuf.read_sample(SAMPLE)
    assert (read.sequences[0].tokens.tolist(), read.sequences[0].stop_reason) == ([5, 2], "stop")
    assert np.isnan(read.prompt_logprobs[0])
    assert read.prompt_logprobs[1] == -1


def test_outputs_of_several_widths_keep_the_order_of_their_datums():
    outputs = [{"logprobs": np.full((2, k), k, np.float32)} for k in (3, 3, 1, 3)]
    read = protobuf.read_output(protobuf.write_output(ForwardBackwardOutput(outputs, {})))
    assert [each["logprobs"].shape for each in read.outputs] == [(2, 3), (2, 3), (2, 1), (2, 3)]


def test_sparse_inputs_are_read_with_their_missing_cells():
    for form in ("protobuf", "json"):
        sent = request(weights=SPARSE)
        if form == "protobuf":
            read = protobuf.read_request(protobuf.write_request(sent))
        else:
            read = json_form.read_request(
                json.loads(json.dumps(json_form.write_request(sent))), "forward_backward_input"
            )
        weights = read.data[0].loss_inputs["weights"].dense()
        assert weights.tolist() == [[1, 0, 0, 0.5], [0, 0, 0, 0], [0, -2, 0, 0]], form


def test_bfloat16_inputs_are_widened():
    message = protobuf._parse("ForwardBackwardRequest", REQUEST)
    tensor = message.data[0].loss_fn_inputs["weights"]
    tensor.dense, tensor.dtype = np.array([0x3F80, 0xC000, 0x3FC0], "<u2").tobytes(), protobuf.BFLOAT16
    tensor.shape.append(3)
    read = protobuf.read_request(message.SerializeToString())
    assert read.data[0].loss_inputs["weights"].values.tolist() == [1.0, -2.0, 1.5]


def test_texts_of_a_loss_configuration_come_with_its_numbers():
    sent = ForwardBackwardRequest("m", 3, request(a=tensor_of([1, 2, 3])).data, "ppo", {"clip": 0.8, "kind": "x"}, True)
    read = protobuf.read_request(protobuf.write_request(sent))
    assert (read.loss_config, read.forward_only) == ({"clip": 0.8, "kind": "x"}, True)


def test_tables_of_best_tokens_and_targets_survive():
    best = BestTokens(np.array([[0, 0], [7, 9]], np.int32), f32(-99999, -99999, -0.5, -1).reshape(2, 2))
    sequence = SampledSequence(np.array([1]), None, "length", best)
    sent = SampleResponse([sequence], None, best, 4, tensor_of(f32(-1, -2).reshape(1, 2)))
    read = protobuf.read_sample(protobuf.write_sample(sent))
    assert read.best_of_prompt.token_ids.tolist() == [[0, 0], [7, 9]]
    assert (read.sequences[0].logprobs, read.sequences[0].stop_reason, read.cache_hit_tokens) == (None, "length", 4)
    assert read.target_prompt_logprobs.dense().tolist() == [[-1, -2]]
    assert json_form.write_sample(sent)["topk_prompt_logprobs"] == [None, [[7, -0.5], [9, -1]]]


BAD_INPUTS = {
    "shape of another length": request(a=Tensor(f32(1, 2), (3,))),
    "fewer positions than tokens": request(a=tensor_of([1, 2])),
    "negative shape": request(a=Tensor(f32(1), (-1, -1))),
    "three axes": request(a=Tensor(f32(1, 2, 3), (3, 1, 1))),
    "not finite": request(a=tensor_of([1.0, float("nan"), 2.0])),
    "huge and sparse": request(a=Tensor(f32(), (3, 2**40), np.zeros(4, int), np.empty(0, int))),
    "columns outside": request(a=Tensor(f32(1), (3, 4), np.array([0, 1, 1, 1]), np.array([4]))),
    "rows that shrink": request(a=Tensor(f32(1), (3, 4), np.array([0, 2, 0, 1]), np.array([0]))),
    "no datums": ForwardBackwardRequest("m", 1, [], "ppo"),
    "no tokens": ForwardBackwardRequest("m", 1, [Datum(np.array([], int), {})], "ppo"),
    "negative tokens": ForwardBackwardRequest("m", 1, [Datum(np.array([3, -1]), {})], "ppo"),
    "too many datums": ForwardBackwardRequest("m", 1, [Datum(np.array([1]), {})] * 5, "ppo"),
    "too many tokens": ForwardBackwardRequest("m", 1, [Datum(np.ones(50, int), {})], "ppo"),
}


@pytest.mark.parametrize("form", ["protobuf", "json"])
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_requests_that_cannot_be_right_are_refused(bad, form):
    sent, limits = BAD_INPUTS[bad], Limits(datums=4, tokens=40)
    with pytest.raises(Refused) as refusal:
        if form == "protobuf":
            protobuf.read_request(protobuf.write_request(sent), limits)
        else:
            body = json.loads(json.dumps(json_form.write_request(sent)))
            json_form.read_request(body, "forward_backward_input", limits)
    assert len(str(refusal.value).splitlines()) == 1


def mutations(raw: bytes, count: int, seed: int):
    """Bytes flipped, cut out, repeated and made up."""
    chance = random.Random(seed)
    for _ in range(count):
        body = bytearray(raw)
        for _ in range(chance.randint(1, 6)):
            place, act = chance.randrange(len(body) or 1), chance.randrange(5)
            if act == 0 and body:
                body[place] = chance.randrange(256)
            elif act == 1:
                del body[place:]
            elif act == 2:
                del body[place : place + chance.randint(1, 9)]
            elif act == 3:
                body[place:place] = chance.randbytes(chance.randint(1, 9))
            else:
                body += body[place : place + 20]
        yield bytes(body)


SEEDS = {
    "request": (REQUEST, protobuf.read_request),
    "sparse": (protobuf.write_request(request(weights=SPARSE)), protobuf.read_request),
    "output": (OUTPUT, protobuf.read_output),
    "sample": (SAMPLE, protobuf.read_sample),
}


@pytest.mark.parametrize("name", SEEDS)
def test_two_thousand_mutations_are_read_or_refused(name):
    raw, read = SEEDS[name]
    refused = 0
    for body in mutations(raw, 2000, seed=23):
        try:
            message = read(body)
        except Refused:
            refused += 1
            continue
        if isinstance(message, ForwardBackwardRequest):  # whatever is accepted can be used
            assert all(
                tensor.dense().shape[0] == d.tokens.size for d in message.data for tensor in d.loss_inputs.values()
            )
    assert refused > 500


def test_mutated_json_is_read_or_refused():
    text = json.dumps(json_form.write_request(request(weights=SPARSE, target_tokens=tensor_of([1, 2, 3])))).encode()
    swaps = (b"null", b"-1", b"1e400", b'"x"', b"[]", b"{}", b"1e30", b"[[1],2]", b"true")
    chance = random.Random(5)
    for _ in range(2000):
        body = text
        for number in (b"0", b"1", b"3", b"0.5", b"-2.0", b"[", b'"int64"', b'"float32"'):
            if chance.random() < 0.3:
                body = body.replace(number, chance.choice(swaps), chance.randint(1, 3))
        try:
            form = json.loads(body)
        except json.JSONDecodeError:
            continue
        try:
            json_form.read_request(form, "forward_backward_input")
        except Refused:
            continue


def test_sampling_keeps_the_difference_between_no_stops_and_the_models_own():
    base = {"sampling_session_id": "s:sample:0", "seq_id": 10**18, "prompt": {"chunks": [{"tokens": [1, 2]}]}}
    stops = [None, [], [5], "x", ["x", "y"]]
    read = [json_form.read_sample_request(base | {"sampling_params": {"stop": stop}}) for stop in stops]
    assert [each.params.stop for each in read] == stops
    assert read[0].seq_id == 10**18
    assert read[0].params == SamplingParams()


@pytest.mark.parametrize(
    "bad",
    [
        *({"num_samples": 0}, {"num_samples": 10**6}, {"num_samples": True}, {"seq_id": 2**63}, {"seq_id": "1"}),
        *({"prompt": {"chunks": []}}, {"prompt": {"chunks": [{"type": "image"}]}}, {"prompt": None}),
        *({"sampling_params": {"stop": [1, "x"]}}, {"sampling_params": {"stop": {}}}),
        *({"sampling_params": {"temperature": -1}}, {"sampling_params": {"top_p": 0}}),
        *({"sampling_params": {"max_tokens": 0}}, {"sampling_params": {"max_tokens": 1.5}}),
        *({"topk_prompt_logprobs": 10**9}, {"target_prompt_logprobs": {"data": [1], "dtype": "int8"}}),
    ],
)
def test_sampling_that_cannot_be_right_is_refused(bad):
    base = {"sampling_session_id": "s:sample:0", "seq_id": 1, "prompt": {"chunks": [{"tokens": [1]}]}}
    with pytest.raises(Refused):
        json_form.read_sample_request(base | bad)


def test_optimizer_numbers_have_the_clients_defaults():
    assert json_form.read_adam({"learning_rate": 1e-3}) == AdamParams(1e-3, 0.9, 0.95, 1e-12, 0.0, 0.0)
    for bad in ({"learning_rate": -1}, {"beta1": 1.0}, {"eps": "x"}, {"learning_rate": float("inf")}, []):
        with pytest.raises(Refused):
            json_form.read_adam(bad)
