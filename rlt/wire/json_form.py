"""The JSON forms: what SDK 0.24.1 sends and may read, and the sampling request of every version."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rlt.errors import Refused
from rlt.wire.checks import array_of_list, check_count, checked_datum, checked_tensor, checked_tokens
from rlt.wire.form import SEQ_LIMIT, flag, mapping, sequence, text, whole
from rlt.wire.values import (
    NUMBER_TYPES,
    AdamParams,
    BestTokens,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    Limits,
    SampleResponse,
    SamplingParams,
    Tensor,
)

NO_LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class SampleRequest:
    sampler_id: str
    seq_id: int
    prompt: np.ndarray  # (N) int64
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    best_of_prompt: int = 0
    best_of_samples: int = 0
    targets: Tensor | None = None  # (N - 1, K) int64, -1 where there is none; row i is scored at position i + 1
    alternatives: int = 0
    last_prompt_logprobs: int | None = None  # only so many of the prompt's last positions are asked for


def _read_tensor(value: Any, name: str, limits: Limits) -> Tensor:
    form = mapping(value, name)
    dtype = form.get("dtype")
    if dtype not in NUMBER_TYPES:
        raise Refused(f"{name} has the number type {dtype!r}: {' and '.join(NUMBER_TYPES)} are read")
    numbers = array_of_list(form.get("data"), dtype, name)
    lengths = form.get("shape")
    shape = (numbers.size,) if lengths is None else tuple(array_of_list(lengths, "int64", f"{name}'s shape").tolist())
    starts, columns = form.get("sparse_crow_indices"), form.get("sparse_col_indices")
    if starts is None:
        return checked_tensor(Tensor(numbers, shape), name, limits)
    rows = array_of_list(starts, "int64", f"{name}'s rows")
    if not rows.size:
        raise Refused(f"{name} is sparse, and has no rows")
    return checked_tensor(
        Tensor(numbers, shape, rows, array_of_list(columns, "int64", f"{name}'s columns")), name, limits
    )


def _write_tensor(tensor: Tensor) -> dict[str, Any]:
    form = {"data": tensor.values.reshape(-1).tolist(), "dtype": tensor.values.dtype.name, "shape": list(tensor.shape)}
    if tensor.row_starts is not None and tensor.columns is not None:
        form |= {"sparse_crow_indices": tensor.row_starts.tolist(), "sparse_col_indices": tensor.columns.tolist()}
    return form


def read_tokens(value: Any, limits: Limits = NO_LIMITS) -> np.ndarray:
    """The tokens of a model input's chunks, in their order."""
    chunks = [mapping(chunk, "a chunk") for chunk in sequence(mapping(value, "a prompt").get("chunks"), "chunks")]
    for chunk in chunks:
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise Refused(f"a chunk of the type {chunk['type']!r}: only text tokens are read")
    pieces = [array_of_list(chunk.get("tokens"), "int64", "tokens") for chunk in chunks]
    return checked_tokens(np.concatenate(pieces) if pieces else np.empty(0, np.int64), limits)


def _read_datum(value: Any, limits: Limits) -> Datum:
    form = mapping(value, "a datum")
    inputs = mapping(form.get("loss_fn_inputs"), "loss_fn_inputs")
    tensors = {name: _read_tensor(each, name, limits) for name, each in inputs.items()}
    return checked_datum(Datum(read_tokens(form.get("model_input"), limits), tensors), limits)


def read_place(form: Any) -> tuple[str, int]:
    """The model and number of a training request, also where the rest of it will be refused."""
    body = mapping(form, "the body")
    return text(body, "model_id"), whole(body.get("seq_id"), "seq_id", least=1)  # a model is made by its request 0


def read_request(form: Any, key: str, limits: Limits = NO_LIMITS) -> ForwardBackwardRequest:
    """`key` is `forward_backward_input` or `forward_input`, which differ in whether gradients are made."""
    model_id, seq_id = read_place(form)
    given = mapping(form.get(key), key)
    data = sequence(given.get("data"), "data")
    check_count(len(data), limits)
    config = dict(mapping(given.get("loss_fn_config") or {}, "loss_fn_config"))
    for name, value in config.items():
        if not isinstance(value, int | float | str) or isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{name} of loss_fn_config is {value!r}: give a finite number or a text")
    read = [_read_datum(datum, limits) for datum in data]
    name = text(given, "loss_fn")
    return ForwardBackwardRequest(model_id, seq_id, read, name, config, forward_only=key == "forward_input")


def write_request(request: ForwardBackwardRequest) -> dict[str, Any]:
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": datum.tokens.tolist()}]},
            "loss_fn_inputs": {name: _write_tensor(tensor) for name, tensor in datum.loss_inputs.items()},
        }
        for datum in request.data
    ]
    key = "forward_input" if request.forward_only else "forward_backward_input"
    given = {"data": data, "loss_fn": request.loss_fn, "loss_fn_config": request.loss_config}
    return {key: given, "model_id": request.model_id, "seq_id": request.seq_id}


def write_output(output: ForwardBackwardOutput) -> dict[str, Any]:
    outputs = [
        {name: _write_tensor(Tensor(array, array.shape)) for name, array in each.items()} for each in output.outputs
    ]
    return {"loss_fn_output_type": output.output_type, "loss_fn_outputs": outputs, "metrics": output.metrics}


def write_best(best: BestTokens) -> list[list[list[float]] | None]:
    """None for a position without candidates."""
    rows = []
    for ids, logprobs in zip(best.token_ids.tolist(), best.logprobs.tolist(), strict=True):
        pairs = [[token, value] for token, value in zip(ids, logprobs, strict=True) if value > -99999.0]
        rows.append(pairs or None)
    return rows


def write_sample(response: SampleResponse) -> dict[str, Any]:
    sequences = [
        {
            "stop_reason": each.stop_reason,
            "tokens": each.tokens.tolist(),
            "logprobs": None if each.logprobs is None else each.logprobs.tolist(),
        }
        for each in response.sequences
    ]
    form: dict[str, Any] = {"type": "sample", "sequences": sequences}
    if response.prompt_logprobs is not None:
        values = response.prompt_logprobs.tolist()
        form["prompt_logprobs"] = [None if math.isnan(value) else value for value in values]
    if response.best_of_prompt is not None:
        form["topk_prompt_logprobs"] = write_best(response.best_of_prompt)
    return form


def _given(form: Mapping[str, Any], kind: type, name: str) -> Any:
    """A dataclass from the fields that were sent; unknown ones are not read, as clients may be newer."""
    known = {field.name for field in fields(kind)}
    sent = {key: value for key, value in mapping(form, name).items() if key in known and value is not None}
    for key, value in sent.items():
        if key != "stop" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Refused(f"{key} of {name} is {value!r}: give a number")
    return kind(**sent)


def read_adam(form: Any) -> AdamParams:
    return _given(form, AdamParams, "adam_params")


def read_sampling(form: Any) -> SamplingParams:
    params = _given(form, SamplingParams, "sampling_params")
    stop = params.stop
    if isinstance(stop, list):
        kinds = {type(each) for each in stop}
        if len(kinds) > 1 or kinds - {int, str}:
            raise Refused("stop holds several kinds of values: give token numbers or texts")
    elif not isinstance(stop, str | None):
        raise Refused(f"stop is {stop!r}: give a text, a list of texts or a list of token numbers")
    for name in ("max_tokens", "seed", "top_k"):
        if getattr(params, name) is not None:
            whole(getattr(params, name), name, least=-SEQ_LIMIT if name == "seed" else -1)
    return params


def read_sample_place(form: Any) -> tuple[str, int]:
    body = mapping(form, "the body")
    return text(body, "sampling_session_id"), whole(body.get("seq_id"), "seq_id")


def read_sample_request(form: Any, limits: Limits = NO_LIMITS) -> SampleRequest:
    sampler_id, seq_id = read_sample_place(form)
    prompt = read_tokens(form.get("prompt"), limits)
    targets, last = form.get("target_prompt_logprobs"), form.get("prompt_logprobs_last_n")

    def count(name: str) -> int:
        return whole(form.get(name) or 0, name, most=limits.candidates)

    return SampleRequest(
        sampler_id,
        seq_id,
        prompt,
        whole(form.get("num_samples", 1), "num_samples", 1, limits.samples),
        read_sampling(form.get("sampling_params") or {}),
        prompt_logprobs=flag(form, "prompt_logprobs", False),
        best_of_prompt=count("topk_prompt_logprobs"),
        best_of_samples=count("topk_sample_logprobs"),
        targets=None if targets is None else _read_tensor(targets, "target_prompt_logprobs", limits),
        alternatives=count("prompt_alt_tokens_k"),
        last_prompt_logprobs=None if last is None else whole(last, "prompt_logprobs_last_n"),
    )
