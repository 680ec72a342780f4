"""Weights in chunks of bounded size: files in shared memory, which servers on other machines fetch over HTTP.

The server's side is an engine that vLLM's registry of weight transfers knows by the name `chunks`; its entry point
stands in pyproject.toml.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlt.errors import Refused
from rlt.generation.served.adapters import adapted_weights
from rlt.launching.connection import CONNECT_LIMIT_S
from rlt.places import KEY_VARIABLE

BACKEND = "chunks"
CHUNK_BYTES = 2**27  # what is packed before it is sent; a larger tensor is a chunk of its own
ALIGNMENT = 64
FETCH_LIMIT_S = 600


@dataclass
class Packed:
    """A tensor of a chunk, `offset` bytes from its start."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


@dataclass
class ChunkInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class ChunkUpdate(WeightTransferUpdateInfo):
    """Where a chunk is (a file, or an address), what is in it, and the sum of its words."""

    source: str
    size: int
    tensors: list[dict]
    checksum: int
    adapter_of: str = ""  # a base model: the chunk holds an adapter's factors (adapters.py), not weights


def checksum(chunk_Z: torch.Tensor) -> int:
    """The sum of a chunk's 64-bit words, modulo 2**64 (as a signed number); Z bytes, a multiple of eight."""
    return int(chunk_Z.view(torch.int64).sum())


class ChunkFiles:
    """Files of a folder that weights are packed into, the same ones every time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._buffers: list[torch.Tensor] = []

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.chunk"

    def write(
        self, weights: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, adapter_of: str = ""
    ) -> Iterator[ChunkUpdate]:
        """Each tensor is copied once, and a neighbour with the same memory (a tied head) not again."""
        number, end, packed, before = 0, 0, [], None
        for name, tensor in weights:
            shares = before is not None and before.data_ptr() == tensor.data_ptr() and before.shape == tensor.shape
            size = _padded(tensor.numel() * dtype.itemsize)
            if packed and not shares and end + size > CHUNK_BYTES:
                yield self._finished(number, end, packed, adapter_of)
                number, end, packed = number + 1, 0, []
            if not shares:
                buffer = self._buffer(number, max(CHUNK_BYTES, size))
                _view(buffer, end, dtype, tensor.shape).copy_(tensor)
                end += size
            packed.append(Packed(name, str(dtype).removeprefix("torch."), list(tensor.shape), end - size))
            before = tensor
        if packed:
            yield self._finished(number, end, packed, adapter_of)

    def content(self, update: ChunkUpdate) -> memoryview:
        number = next(n for n in range(len(self._buffers)) if str(self.path(n)) == update.source)
        return self._buffers[number][: update.size].numpy().data

    def _buffer(self, number: int, size: int) -> torch.Tensor:
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0))
        if len(self._buffers[number]) < size:
            with self.path(number).open("ab") as file:  # an error here, where touching a page would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            mapped = torch.from_file(str(self.path(number)), shared=True, size=size, dtype=torch.uint8)
            self._buffers[number] = mapped
        return self._buffers[number]

    def _finished(self, number: int, end: int, packed: list[Packed], adapter_of: str) -> ChunkUpdate:
        total = checksum(self._buffers[number][:end])
        return ChunkUpdate(str(self.path(number)), end, [vars(tensor) for tensor in packed], total, adapter_of)


def read_chunk(update: ChunkUpdate) -> torch.Tensor:
    """A chunk's bytes, mapped or fetched.

    Raises:
        ValueError: they are not those that were sent.
    """
    if update.source.startswith("http"):
        chunk_Z = torch.frombuffer(_fetch(update), dtype=torch.uint8)
    else:
        chunk_Z = torch.from_file(update.source, shared=False, size=update.size, dtype=torch.uint8)
    found = checksum(chunk_Z)
    if found != update.checksum:
        raise ValueError(f"weights in {update.source} sum to {found}, sent were {update.checksum}")
    return chunk_Z


def _fetch(update: ChunkUpdate) -> bytearray:
    headers = {"Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, '')}"}
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(update.source, headers=headers, timeout=(CONNECT_LIMIT_S, FETCH_LIMIT_S))
    answer.raise_for_status()
    return bytearray(answer.content)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _view(chunk_Z: torch.Tensor, offset: int, dtype: torch.dtype, shape) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return chunk_Z[offset : offset + size].view(dtype).view(shape)


class ChunkTransfer(WeightTransferEngine[ChunkInit, ChunkUpdate]):
    """The receiving side: vLLM's layerwise reload, fed from chunks."""

    init_info_cls = ChunkInit
    update_info_cls = ChunkUpdate

    model: Any  # vLLM's, of any architecture

    def init_transfer_engine(self, init_info: ChunkInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.factors: dict[str, torch.Tensor] = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # Overridden because vLLM's waits for an accelerator, which a CPU has not.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self._end_update()  # else the next request would meet layers without weights, and end the engine
            raise

    def receive_weights(self, update_info: ChunkUpdate) -> None:
        chunk_Z = read_chunk(update_info)
        packed = [Packed(**tensor) for tensor in update_info.tensors]
        tensors = ((t.name, _view(chunk_Z, t.offset, getattr(torch, t.dtype), t.shape)) for t in packed)
        if update_info.adapter_of:
            self._check_base(update_info.adapter_of)
            self.factors |= {name: tensor.clone() for name, tensor in tensors}  # the file will hold others
        else:
            self.model.load_weights(tensors)

    def _check_base(self, theirs: str) -> None:
        if theirs != self.model_config.model:
            raise Refused(
                f"an adapter of {theirs} was sent to a server of {self.model_config.model}: start it with the same "
                "model_name_or_path"
            )

    def finish_weight_update(self) -> None:
        if self.factors:
            self.model.load_weights(adapted_weights(self.model_config.model, self.factors))
        self._end_update()

    def _end_update(self) -> None:
        """Layers that got no new weights have their old ones again."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def register() -> None:
    """vLLM may call it more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ChunkTransfer)
