"""The protobuf forms, byte for byte what SDK 0.38 and 0.24.1 write and read."""

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from rlt.errors import Refused
from rlt.wire.checks import array_of_bytes, check_count, checked_datum, checked_tensor, checked_tokens
from rlt.wire.schema import ENUMS, message_class
from rlt.wire.values import (
    BestTokens,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    Limits,
    SampledSequence,
    SampleResponse,
    Tensor,
)

FLOAT32, INT64, INT32, BFLOAT16 = (ENUMS["DType"][name] for name in ("FLOAT32", "INT64", "INT32", "BFLOAT16"))
NUMBERS_OF = {"float32": FLOAT32, "int64": INT64, "int32": INT32}
NO_LIMITS = Limits()
STOP_REASONS = ("stop", "length")


def _parse(name: str, raw: bytes) -> Any:
    message = message_class(name)()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise Refused(f"the body is no {name} in protobuf") from error
    return message


def _bytes_of(array: np.ndarray, dtype: str) -> bytes:
    return np.ascontiguousarray(array, f"<{dtype}").tobytes()


def _numbers(raw: bytes, dtype: int, name: str) -> np.ndarray:
    """float32 or int64, whichever the four number types of the wire widen to."""
    if dtype == BFLOAT16:
        return (array_of_bytes(raw, "u2", name).astype(np.uint32) << 16).view(np.float32)
    if dtype == FLOAT32:
        return array_of_bytes(raw, "f4", name)
    if dtype in (INT64, INT32):
        return array_of_bytes(raw, "i8" if dtype == INT64 else "i4", name).astype(np.int64)
    raise Refused(f"{name} has the number type {dtype}: float32, bfloat16, int64 and int32 are read")


def _read_tensor(message: Any, name: str, limits: Limits) -> Tensor:
    shape = tuple(message.shape)
    encoding = message.WhichOneof("encoding")
    if encoding == "sparse_csr":
        sparse = message.sparse_csr
        starts = array_of_bytes(sparse.crow_indices, "i8", name)
        columns = array_of_bytes(sparse.col_indices, "i8", name)
        tensor = Tensor(_numbers(sparse.values, message.dtype, name), shape, starts, columns)
    else:
        tensor = Tensor(_numbers(message.dense, message.dtype, name), shape)
    return checked_tensor(tensor, name, limits)


def _write_tensor(message: Any, tensor: Tensor) -> None:
    dtype = tensor.values.dtype.name
    raw = _bytes_of(tensor.values, tensor.values.dtype.str[1:])
    if tensor.row_starts is not None:
        message.sparse_csr.values = raw
        message.sparse_csr.crow_indices = _bytes_of(tensor.row_starts, "i8")
        message.sparse_csr.col_indices = _bytes_of(tensor.columns, "i8")  # type: ignore[arg-type]
    else:
        message.dense = raw
    message.dtype = NUMBERS_OF[dtype]
    message.shape.extend(tensor.shape)


def _read_datum(message: Any, limits: Limits) -> Datum:
    kinds = {chunk.WhichOneof("chunk") for chunk in message.model_input}
    if kinds - {"encoded_text"}:
        raise Refused("a datum holds images or sound: only text tokens are read")
    pieces = [array_of_bytes(chunk.encoded_text.tokens, "i4", "model_input") for chunk in message.model_input]
    tokens = checked_tokens(np.concatenate(pieces) if pieces else np.empty(0, np.int32), limits)
    named = message.loss_fn_inputs.items()
    return checked_datum(Datum(tokens, {name: _read_tensor(each, name, limits) for name, each in named}), limits)


def read_place(raw: bytes) -> tuple[str, int]:
    """The model and number of a training request, also where the rest of it will be refused."""
    message = _parse("ForwardBackwardRequest", raw)
    if message.seq_id < 1:
        raise Refused(f"seq_id is {message.seq_id}: numbers begin at 1")
    return message.model_id, message.seq_id


def read_request(raw: bytes, limits: Limits = NO_LIMITS) -> ForwardBackwardRequest:
    message = _parse("ForwardBackwardRequest", raw)
    check_count(len(message.data), limits)
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    data = [_read_datum(datum, limits) for datum in message.data]
    return ForwardBackwardRequest(
        message.model_id, message.seq_id, data, message.loss_fn, config, message.forward_only
    )  # fmt: skip


def write_request(request: ForwardBackwardRequest) -> bytes:
    message = message_class("ForwardBackwardRequest")(
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for datum in request.data:
        written = message.data.add()
        written.model_input.add().encoded_text.tokens = _bytes_of(datum.tokens, "i4")
        for name, tensor in datum.loss_inputs.items():
            _write_tensor(written.loss_fn_inputs[name], tensor)
    for name, value in request.loss_config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config_v2[name].number = message.loss_fn_config[name] = value
    return message.SerializeToString(deterministic=True)


def _write_record(message: Any, outputs: list[dict[str, np.ndarray]]) -> None:
    """Neighbouring datums whose outputs have the same number of candidates."""
    message.num_datums = len(outputs)
    for name in outputs[0]:
        arrays = [np.ascontiguousarray(output[name]) for output in outputs]
        batch = message.fields[name]
        raw = [_bytes_of(array, array.dtype.str[1:]) for array in arrays]
        batch.data = b"".join(raw)
        batch.offsets = _bytes_of(np.cumsum([0, *(len(piece) for piece in raw)]), "i8")
        batch.dtype = NUMBERS_OF[arrays[0].dtype.name]
        batch.trailing_shape.extend(arrays[0].shape[1:])


def write_output(output: ForwardBackwardOutput) -> bytes:
    message = message_class("ForwardBackwardOutput")(loss_fn_output_type=output.output_type)
    group: list[dict[str, np.ndarray]] = []

    def form(each: dict[str, np.ndarray]) -> dict[str, tuple]:
        return {name: (array.dtype, array.shape[1:]) for name, array in each.items()}

    for each in output.outputs:
        if group and form(group[0]) != form(each):
            _write_record(message.loss_fn_outputs.add(), group)
            group = []
        group.append(each)
    if group:
        _write_record(message.loss_fn_outputs.add(), group)
    for name, value in output.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString(deterministic=True)


def _read_record(message: Any) -> list[dict[str, np.ndarray]]:
    outputs: list[dict[str, np.ndarray]] = [{} for _ in range(min(message.num_datums, NO_LIMITS.datums))]
    for name, batch in message.fields.items():
        offsets = array_of_bytes(batch.offsets, "i8", name)
        if offsets.size != len(outputs) + 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0:
            raise Refused(f"{name} does not say where the numbers of its {message.num_datums} datums begin")
        rows = tuple(batch.trailing_shape)
        for number, output in enumerate(outputs):
            array = _numbers(batch.data[offsets[number] : offsets[number + 1]], batch.dtype, name)
            output[name] = _shaped(array, rows, name)
    return outputs


def _shaped(array: np.ndarray, rows: tuple[int, ...], name: str) -> np.ndarray:
    width = int(np.prod(rows, dtype=object)) if rows else 1
    if len(rows) > 1 or width < 1 or array.size % width:
        raise Refused(f"{name} has {array.size} numbers, which are no rows of {list(rows)}")
    return array.reshape(-1, *rows)


def read_output(raw: bytes) -> ForwardBackwardOutput:
    message = _parse("ForwardBackwardOutput", raw)
    outputs = [output for record in message.loss_fn_outputs for output in _read_record(record)]
    return ForwardBackwardOutput(outputs, dict(message.metrics), message.loss_fn_output_type)


def read_metrics(raw: bytes) -> dict[str, float]:
    """What a pass said of itself, without its arrays."""
    return dict(_parse("ForwardBackwardOutput", raw).metrics)


def _write_best(message: Any, best: BestTokens) -> None:
    message.token_ids = _bytes_of(best.token_ids, "i4")
    message.logprobs = _bytes_of(best.logprobs, "f4")
    message.length, message.k = best.token_ids.shape


def _read_best(message: Any) -> BestTokens:
    shape = (message.length, message.k)
    ids = array_of_bytes(message.token_ids, "i4", "token_ids")
    logprobs = array_of_bytes(message.logprobs, "f4", "logprobs")
    if ids.size != shape[0] * shape[1] or logprobs.size != ids.size:
        raise Refused(f"a table of best tokens has {ids.size} tokens, its shape is {list(shape)}")
    return BestTokens(ids.reshape(shape), logprobs.reshape(shape))


def write_sample(response: SampleResponse) -> bytes:
    message = message_class("SampleResponse")(prompt_cache_hit_tokens=response.cache_hit_tokens)
    for sequence in response.sequences:
        written = message.sequences.add(stop_reason=STOP_REASONS.index(sequence.stop_reason))
        written.tokens = _bytes_of(sequence.tokens, "i4")
        if sequence.logprobs is not None:
            written.logprobs = _bytes_of(sequence.logprobs, "f4")
        if sequence.best is not None:
            _write_best(written.topk_sampled_logprobs, sequence.best)
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = _bytes_of(response.prompt_logprobs, "f4")
    if response.best_of_prompt is not None:
        _write_best(message.topk_prompt_logprobs, response.best_of_prompt)
    if response.target_prompt_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.alternatives is not None:
        _write_tensor(message.prompt_alt_tokens.tokens, response.alternatives[0])
        _write_tensor(message.prompt_alt_tokens.logprobs, response.alternatives[1])
    return message.SerializeToString(deterministic=True)


def _read_sequence(message: Any) -> SampledSequence:
    if message.stop_reason not in (0, 1):
        raise Refused(f"the stop reason {message.stop_reason} is not known")
    logprobs = array_of_bytes(message.logprobs, "f4", "logprobs") if message.HasField("logprobs") else None
    best = _read_best(message.topk_sampled_logprobs) if message.HasField("topk_sampled_logprobs") else None
    tokens = array_of_bytes(message.tokens, "i4", "tokens")
    return SampledSequence(tokens, logprobs, STOP_REASONS[message.stop_reason], best)  # type: ignore[arg-type]


def read_sample(raw: bytes) -> SampleResponse:
    message = _parse("SampleResponse", raw)
    has = message.HasField
    prompt = array_of_bytes(message.prompt_logprobs, "f4", "prompt_logprobs") if has("prompt_logprobs") else None
    best = _read_best(message.topk_prompt_logprobs) if has("topk_prompt_logprobs") else None
    target = alternatives = None
    if has("target_prompt_logprobs"):
        target = _read_tensor(message.target_prompt_logprobs, "target_prompt_logprobs", NO_LIMITS)
    if has("prompt_alt_tokens"):
        pair = message.prompt_alt_tokens
        alternatives = tuple(
            _read_tensor(each, "prompt_alt_tokens", NO_LIMITS) for each in (pair.tokens, pair.logprobs)
        )
    sequences = [_read_sequence(sequence) for sequence in message.sequences]
    cached = message.prompt_cache_hit_tokens
    return SampleResponse(sequences, prompt, best, cached, target, alternatives)  # type: ignore[arg-type]
