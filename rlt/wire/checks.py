"""Bytes and lists that came from outside become arrays, or one clear error."""

import math
from typing import Any

import numpy as np

from rlt.errors import Refused
from rlt.wire.values import Datum, Limits, Tensor

INDEX_LIMIT = 2**31 - 1  # of a token's number


def array_of_bytes(raw: bytes, dtype: str, name: str) -> np.ndarray:
    """Little-endian numbers, as they lie."""
    item = np.dtype(f"<{dtype}")
    if len(raw) % item.itemsize:
        raise Refused(f"{name} has {len(raw)} bytes, which is no whole number of {item.name} values")
    return np.frombuffer(raw, item)


def array_of_list(numbers: Any, dtype: str, name: str) -> np.ndarray:
    if not isinstance(numbers, list):
        raise Refused(f"{name} is no list of numbers")
    try:
        read = np.array(numbers)
    except ValueError as error:  # lists of several lengths
        raise Refused(f"{name} is no flat list of numbers") from error
    wanted = "iu" if dtype.startswith("i") else "iuf"
    if read.ndim != 1 or (read.size and read.dtype.kind not in wanted):
        raise Refused(f"{name} is no flat list of {dtype} numbers")
    with np.errstate(over="ignore"):  # a number too large for float32 is refused as not finite
        return read.astype(dtype)


def checked_tokens(tokens: np.ndarray, limits: Limits) -> np.ndarray:
    """(N) int64: neither empty nor too long, and no negative token."""
    if not tokens.size:
        raise Refused("a datum or prompt has no tokens: give one at least")
    if tokens.size > limits.tokens:
        raise Refused(f"a datum or prompt has {tokens.size} tokens: {limits.tokens} at most")
    if tokens.min() < 0 or tokens.max() > INDEX_LIMIT:
        raise Refused(f"tokens from {tokens.min()} to {tokens.max()}: they must lie between 0 and {INDEX_LIMIT}")
    return tokens.astype(np.int64)


def checked_tensor(tensor: Tensor, name: str, limits: Limits) -> Tensor:
    """A tensor whose numbers are finite and fill the shape that it was sent with."""
    shape = tensor.shape
    if len(shape) not in (1, 2) or min(shape) < 0 or shape[0] > limits.tokens or shape[-1] > limits.tokens:
        raise Refused(f"{name} has the shape {list(shape)}: (tokens) or (tokens, candidates) is read")
    if len(shape) == 2 and shape[1] > limits.candidates:
        raise Refused(f"{name} has {shape[1]} candidates at a position: {limits.candidates} at most")
    if tensor.values.dtype.kind == "f" and not np.isfinite(tensor.values).all():
        raise Refused(f"{name} holds numbers that are not finite")
    if tensor.row_starts is not None:
        _check_sparse(tensor, name)
    elif math.prod(shape) != tensor.values.size:
        raise Refused(f"{name} has {tensor.values.size} numbers, its shape {list(shape)} has {math.prod(shape)}")
    return tensor


def _check_sparse(tensor: Tensor, name: str) -> None:
    starts, columns, count = tensor.row_starts, tensor.columns, tensor.values.size
    assert starts is not None
    if columns is None or len(tensor.shape) != 2 or starts.size != tensor.shape[0] + 1 or columns.size != count:
        raise Refused(f"{name} is sparse, and its numbers, rows and columns do not fit the shape {list(tensor.shape)}")
    if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise Refused(f"{name} is sparse, and its rows do not begin at 0, grow, and end at its {count} numbers")
    if count and (columns.min() < 0 or columns.max() >= tensor.shape[1]):
        raise Refused(f"{name} is sparse, and columns lie outside its {tensor.shape[1]}")


def checked_datum(datum: Datum, limits: Limits) -> Datum:
    """Every input of the loss has one row for each token."""
    if len(datum.loss_inputs) > limits.loss_inputs:
        raise Refused(f"a datum has {len(datum.loss_inputs)} loss inputs: {limits.loss_inputs} at most")
    for name, tensor in datum.loss_inputs.items():
        if tensor.shape[0] != datum.tokens.size:
            raise Refused(f"{name} has {tensor.shape[0]} positions, the datum has {datum.tokens.size} tokens")
    return datum


def check_count(datums: int, limits: Limits) -> None:
    if not 0 < datums <= limits.datums:
        raise Refused(f"{datums} datums in a request: 1 to {limits.datums} are read")
