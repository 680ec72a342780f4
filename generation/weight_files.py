"""Weights in files of bounded size, for a vLLM server that shares memory (or a disk) with the trainer.

The server's side is an engine that vLLM's registry of weight transfers knows by the name `file`; its entry point is
`vllm_plugin/`, which stands on the server's path.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "file"
CHUNK_BYTES = 2**28  # of a file: what a side holds beside its model


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A safetensors file and the sum of its words."""

    path: str
    checksum: int


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    """The sum of all 32-bit words (bytes, where a tensor's size is no multiple of four), modulo 2**63."""
    total = 0
    for tensor in tensors.values():
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        total += int((flat.view(torch.int32) if len(flat) % 4 == 0 else flat).sum(dtype=torch.int64))
    return total % 2**63


def write_chunks(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> Iterator[FileUpdate]:
    """Files of about `CHUNK_BYTES`."""
    chunk: dict[str, torch.Tensor] = {}
    number = size = 0
    for name, tensor in weights:
        chunk[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= CHUNK_BYTES:
            yield _write(chunk, folder / f"{number}.safetensors")
            chunk, number, size = {}, number + 1, 0
    if chunk:
        yield _write(chunk, folder / f"{number}.safetensors")


def _write(chunk: dict[str, torch.Tensor], path: Path) -> FileUpdate:
    save_file(chunk, path)
    return FileUpdate(str(path), checksum(chunk))


class FileWeightTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    """The receiving side: vLLM's layerwise reload, fed from files."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # Overridden because vLLM's waits for an accelerator, which a CPU has not.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdate) -> None:
        tensors = load_file(update_info.path)
        found = checksum(tensors)
        if found != update_info.checksum:
            raise ValueError(f"weights in {update_info.path} sum to {found}, sent were {update_info.checksum}")
        self.model.load_weights(tensors.items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def register() -> None:
    """vLLM may call it more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
