"""What vLLM's own weight transfers ask of a trainer: its weights as a source, its servers as one client, where to meet.

`nccl` sends from device to device; `ipc` hands over memory of one device. Rank 0 sends, and the servers are one group:
an update succeeds on all of them, or is made again (direct_engine.py).
"""

import base64
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)

from rlt.errors import Refused
from rlt.generation.served.client import (
    CONTROL_LIMIT_S,
    END_LIMIT_S,
    UPDATE_LIMIT_S,
    Server,
    ServerError,
    ServerGone,
    own_address,
)
from rlt.launching.environment import free_port
from rlt.launching.servers import LOOPBACK


class PolicySource(WeightSource):
    """A policy's weights as an engine takes them, in its precision; all ranks iterate together, as shards are gathered.

    Args:
        weights: names and values, anew at every call.
        dtype: of what is sent, at every call.
    """

    def __init__(self, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]], dtype: Callable[[], torch.dtype]):
        self.weights, self.dtype = weights, dtype
        self._metadata: list[ParamMeta] = []
        self._left: Iterator[tuple[str, torch.Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        """From a pass of its own, the first time: a shard does not say the shape of the whole."""
        if not self._metadata:
            dtype = self.dtype()
            self._metadata = [ParamMeta(name, dtype, tuple(value.shape)) for name, value in self.weights()]
        return self._metadata

    def begin(self) -> None:
        """A new pass, the only one until the next call."""
        self._left = self._values()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._left

    def finish(self) -> None:
        """Take part in what is left of a pass that failed here: the other ranks gather on."""
        for _ in self._left:
            pass

    def _values(self) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = self.dtype()
        for name, value in self.weights():
            yield name, value.detach().to(dtype, copy=True)  # what was gathered is given back behind it


class Abort:
    """Ends a transfer that a server has left: once at most, and only inside its `with` block.

    vLLM leaves the thread of a call behind where the sender fails first. That call fails later, as its server is ended,
    and the next transfer is not its to end.

    Args:
        act: blocks until the sender is freed, or is about to be.
    """

    def __init__(self, act: Callable[[], None] = lambda: None):
        self._acts, self._lock = [act], threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            for act in self._acts:
                act()
            self._acts = []

    def __enter__(self) -> "Abort":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._acts = []


class ServerGroup:
    """All servers of a run behind the four calls of `VLLMWeightSyncClient`: each goes to all, and all have to succeed.

    What every server's update needs around it (a pause, a version, an empty cache) is as for files.
    """

    def __init__(self, servers: list[Server]):
        self.servers, self.version = servers, ""
        self.abort = Abort()

    def all_have(self, version: str) -> bool:
        """Whether all hold these weights, and with them what they agreed on; one that does not say so is ended."""
        found = [self._version_of(server, CONTROL_LIMIT_S) for server in self.servers]
        return found == [version] * len(found)

    def end_those_without(self, version: str) -> None:
        """A server whose update failed has layers without weights, or waits for what does not come."""
        for server in self.servers:
            if self._version_of(server, END_LIMIT_S) not in (version, None):
                server.end()

    @staticmethod
    def _version_of(server: Server, limit_s: float) -> str | None:
        try:
            return server.version(limit_s)
        except ServerGone:
            return None  # it is started again, and the new one is not to be ended
        except ServerError:
            server.end()
            return None

    @property
    def address(self) -> str:
        """This machine's, on the way to the servers."""
        away = [own_address(server.url) for server in self.servers if not server.is_here]
        return away[0] if away else LOOPBACK

    def workers(self) -> list[int]:
        """Of each server: the devices that its model is spread over."""
        return [server.ask("GET", "/get_world_size", limit_s=CONTROL_LIMIT_S)["world_size"] for server in self.servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.servers]
        if "rank_offset" in init_info:  # of a group's ranks, each server's workers come behind those of the one before
            for info, before in zip(infos, accumulate(self.workers(), initial=0), strict=False):
                info["rank_offset"] += before
        calls = [(server, {"init_info": info}) for server, info in zip(self.servers, infos, strict=True)]
        self._on_all(lambda call: call[0].control("/init_weight_transfer_engine", call[1], UPDATE_LIMIT_S), calls)

    def start_weight_update(self) -> None:
        self._on_all(Server.begin_update, self.servers)

    def update_weights(self, update_info: Any) -> None:
        update = as_json(update_info)
        self._on_all(lambda server: server.take_update(update), self.servers)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._on_all(lambda server: server.finish_update(weight_version or self.version), self.servers)

    def _on_all(self, call: Callable[[Any], object], each: list) -> None:
        """At once; the first that fails ends the transfer, as the others would wait in it.

        Raises:
            ServerError: of that one.
        """
        pool, abort = ThreadPoolExecutor(len(each)), self.abort
        try:
            for asked in as_completed([pool.submit(call, one) for one in each]):
                asked.result()
        except ServerError:
            abort()
            raise
        finally:
            pool.shutdown(wait=False)  # each call has its own limit


def as_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """An update as a request can carry it: vLLM takes handles of memory pickled (IPCWeightTransferUpdateInfo)."""
    if "ipc_handles" not in update_info:
        return update_info
    handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    left = {key: value for key, value in update_info.items() if key != "ipc_handles" and value is not None}
    return {**left, "ipc_handles_pickled": handles}


@dataclass(frozen=True)
class Transfer:
    """One of vLLM's transfers, by the name under which both of its factories have it.

    Args:
        meet: what a rank of the trainer begins with.
        abort: end a transfer under way, from another thread.
        fails_alone: rank 0 can give up a transfer without the other ranks, which only gather.
    """

    meet: Callable[[ServerGroup, int], TrainerInitInfo]
    abort: Callable[[Any], None]
    fails_alone: bool = True


def _meet_by_nccl(group: ServerGroup, rank: int) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    if rank != 0:  # rank 0 alone is in the servers' group
        return NCCLTrainerInitInfo("", 0, 0, rank=rank)
    address = group.address
    return NCCLTrainerInitInfo(address, free_port(address), 1 + sum(group.workers()), rank=0)


def _meet_by_ipc(group: ServerGroup, rank: int) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank, packed=True)


def _abort_nccl(engine: Any) -> None:
    engine.model_update_group.destroy()


TRANSFERS = {
    "nccl": Transfer(_meet_by_nccl, _abort_nccl),
    "ipc": Transfer(_meet_by_ipc, lambda engine: None, fails_alone=False),
}


def check_meeting(engine: TrainerWeightTransferEngine) -> None:
    """vLLM goes on without a library of NCCL, and then sends nothing.

    Raises:
        Refused: there is none.
    """
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    if isinstance(engine, NCCLTrainerWeightTransferEngine) and engine.is_sender:
        assert engine.model_update_group is not None  # trainer_init makes it
        if engine.model_update_group.disabled:
            raise Refused("weight_transfer=nccl: vLLM finds no NCCL here; set weight_transfer=files")
