"""vLLM's NCCL weight transfer over sockets of this machine, where there is no GPU.

Both of its classes run as they are, with another communicator below them; servers load it as a plugin of vLLM.
"""

import hashlib
import socket
import time
from pathlib import Path

import torch

LIMIT_S = 60
TAKEN = b"1"


class SocketCommunicator:
    """The part of `PyNcclCommunicator` that a transfer uses: a broadcast blocks until it was taken, or is aborted."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device):
        self.rank, self.disabled, self.sockets = rank, False, []
        if rank:
            self.sockets.append(self._connect(address, port))
            self.sockets[0].sendall(bytes([rank]))
            return
        with socket.create_server((address, port)) as listening:
            listening.settimeout(LIMIT_S)
            self.sockets = [listening.accept()[0] for _ in range(world_size - 1)]
        self.ranks = sorted(one.recv(1)[0] for one in self.sockets)
        assert self.ranks == list(range(1, world_size)), self.ranks
        for one in self.sockets:
            one.settimeout(None)  # as NCCL: without end

    @staticmethod
    def _connect(address: str, port: int) -> socket.socket:
        give_up = time.monotonic() + LIMIT_S
        while True:
            try:
                return socket.create_connection((address, port))
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)

    def broadcast(self, tensor: torch.Tensor, src: int, stream=None) -> None:
        assert src == 0
        content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        if self.disabled:
            return
        try:
            if self.rank == 0:
                self._send(content)
            while self.rank and content:
                taken = self.sockets[0].recv_into(content)
                if not taken:
                    raise OSError("closed")
                content = content[taken:]
            if self.rank:
                self.sockets[0].sendall(TAKEN)
        except OSError as error:
            raise RuntimeError(f"NCCL error: {error}") from error

    def _send(self, content: memoryview) -> None:
        for one in self.sockets:
            one.sendall(content)
        for one in self.sockets:
            if one.recv(1) != TAKEN:
                raise OSError("closed")

    def destroy(self) -> None:
        self.disabled = True
        for one in self.sockets:
            one.shutdown(socket.SHUT_RDWR)


class Stream:
    def synchronize(self) -> None:
        """Nothing is under way."""


def install() -> None:
    """For this process; a second time is the first."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor
    from vllm.v1.worker.worker_base import WorkerBase

    nccl_common.stateless_init_process_group = SocketCommunicator
    packed_tensor._get_streams = lambda device, number: (Stream(),) * number
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda: None
    torch.cuda.current_stream = lambda: None
    WorkerBase.digest, WorkerBase.pack, WorkerBase.by_files = digest, pack, by_files


def pack(worker, value: bool) -> None:
    worker.weight_transfer_engine.packed = value


def by_files(worker, updates: list[dict]) -> None:
    """What the server's other way of taking weights makes of them."""
    from vllm.config import set_current_vllm_config

    from rlt.generation.served.weight_files import ChunkTransfer

    config = worker.vllm_config
    transfer = ChunkTransfer(config.weight_transfer_config, config, worker.device, worker.model_runner.get_model())
    with set_current_vllm_config(config):
        transfer.start_weight_update()
        for update in updates:
            transfer.update_weights(update)
        transfer.finish_weight_update()


def digest(worker) -> str:
    """Of a server's weights as it computes with them."""
    found = hashlib.sha256()
    for name, value in sorted(worker.model_runner.get_model().state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def plugin_folder(folder: Path) -> str:
    """A value of PYTHONPATH by which vLLM's processes find this file, and the name under which they load it."""
    info = folder / "sockets-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sockets\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nnccl_by_sockets = nccl_by_sockets:install\n")
    return f"{folder}:{Path(__file__).parent}"
