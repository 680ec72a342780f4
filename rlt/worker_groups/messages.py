"""Operations and what they give as plain data: JSON, with tensors beside it as safetensors. Nothing in it is code.

A message is the length of its JSON, its JSON, and its tensors; on a socket its own length comes first.
"""

import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from backends.protocol import AdamParams, Datum, ForwardOutput, StepOutput
from rlt.errors import Refused
from rlt.worker_groups.sampling import Sample

LENGTH = struct.Struct("!Q")
RECORDS = {record.__name__: record for record in (AdamParams, Datum, ForwardOutput, Sample, StepOutput)}
TENSOR, MAP, PATH = "tensor", "map", "path"  # beside the names of records: what a JSON object stands for


def pack(value: Any) -> bytes:
    """
    Raises:
        Refused: something in it is no plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return LENGTH.pack(len(text)) + text + save(tensors)


def unpack(message: bytes) -> Any:
    """What `pack` was given; lists for tuples."""
    start = LENGTH.size + LENGTH.unpack_from(message)[0]
    return _value(json.loads(message[LENGTH.size : start]), load(message[start:]))


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, Path):
        return {PATH: str(value)}
    if is_dataclass(value) and type(value).__name__ in RECORDS:
        return {type(value).__name__: {f.name: _plain(getattr(value, f.name), tensors) for f in fields(value)}}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {MAP: {key: _plain(part, tensors) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return [_plain(part, tensors) for part in value]
    what = f"the function {value.__name__}" if callable(value) and hasattr(value, "__name__") else type(value).__name__
    raise Refused(f"{what} cannot be sent to other processes: numbers, texts, tensors and losses by name can")


def _value(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(plain, list):
        return [_value(part, tensors) for part in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, inner),) = plain.items()
    if kind == TENSOR:
        return tensors[inner]
    if kind == PATH:
        return Path(inner)
    parts = {name: _value(part, tensors) for name, part in inner.items()}
    return parts if kind == MAP else RECORDS[kind](**parts)


def send(end: socket.socket, message: bytes) -> None:
    end.sendall(LENGTH.pack(len(message)))
    end.sendall(message)


def receive(end: socket.socket) -> bytes:
    """
    Raises:
        EOFError: the other side has ended.
    """
    return _exactly(end.recv_into, LENGTH.unpack(_exactly(end.recv_into, LENGTH.size))[0])


def _exactly(read: Callable[[memoryview], int], size: int) -> bytes:
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        count = read(rest)
        if not count:
            raise EOFError("the other side has ended")
        rest = rest[count:]
    return bytes(found)
