"""What runs in a Ray cluster's actors: a rank, or a sampler. Messages are those of messages.py."""

import os
from typing import Any

from rlt.worker_groups.rank import Worker


class RayRank:
    """An actor: one rank."""

    def place(self) -> tuple[str, int]:
        """Where the others may meet it: its address, and a port that is free."""
        import ray

        from rlt.launching.environment import free_port

        return ray.util.get_node_ip_address(), free_port()

    def begin(self, environment: dict[str, str], kind: str, arguments: dict[str, Any]) -> bytes:
        import ray

        os.environ |= environment | {"GLOO_SOCKET_IFNAME": _interface(ray.util.get_node_ip_address())}
        self.worker = Worker(kind, arguments)
        return self.worker.begin()

    def answer(self, message: bytes) -> bytes:
        return self.worker.answer(message)

    def is_there(self) -> bool:
        return True


class RaySampler:
    """An actor: what draws completions."""

    def begin(self, arguments: dict[str, Any]) -> None:
        from rlt.worker_groups.sampling import Sampler

        named = {name: arguments[name] for name in ("model_name", "dtype", "device") if name in arguments}
        self.sampler = Sampler(**named)

    def answer(self, message: bytes) -> bytes:
        """[operation, arguments...] of the sampler; or what rank 0 says its weights are."""
        from backends.futures import Worker as Thread
        from rlt.worker_groups.messages import pack, unpack

        asked = unpack(message)
        operation, *arguments = ["load_weights", asked["value"]] if isinstance(asked, dict) else asked
        thread = Thread("a sampler")
        done = thread.submit(getattr(self.sampler, operation), *arguments)
        error = done.exception()
        thread.close()
        return pack({"error": type(error).__name__, "text": str(error)} if error else {"value": done.result(0)})

    def is_there(self) -> bool:
        return True


def _interface(address: str) -> str:
    """The network interface that has an address of this machine; gloo would take that of the host's name."""
    import psutil

    places = psutil.net_if_addrs().items()
    return next((name for name, found in places if any(place.address == address for place in found)), "lo")
