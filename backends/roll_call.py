"""Several processes of one run: how they meet, and who is missing or slow."""

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch.distributed import TCPStore
from transformers import TrainerCallback

LOOPBACK = "127.0.0.1"


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def meet(limit_s: int) -> None:
    """Wait for the other ranks, for `limit_s` seconds at most."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=limit_s))


def are_on_one_machine() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def open_store_on_loopback(limit_s: int) -> TCPStore | None:
    """Where the ranks of one machine meet: torch's own store would listen on all of its addresses, without a key.

    Torch is told that somebody else holds it, by which it asks at MASTER_ADDR and MASTER_PORT.

    Returns:
        On rank 0, what holds it while the run lasts.
    """
    place = LOOPBACK, int(os.environ["MASTER_PORT"])
    os.environ |= {"MASTER_ADDR": LOOPBACK, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if os.environ["RANK"] != "0":
        return None
    listening = socket.create_server(place).detach()
    limit = timedelta(seconds=limit_s)
    return TCPStore(*place, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listening)


def leave_group(together: bool = False) -> None:
    """Threads of a process group that outlive the interpreter abort a run that came to its end.

    Args:
        together: wait for the others: torchrun would end those that are still saving.
    """
    if torch.distributed.is_initialized():
        if together:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def slowest(seconds: float, device: torch.device) -> dict[str, float]:
    """How unevenly a phase took the ranks, and the most memory that any of them holds (GiB).

    Args:
        seconds: of the phase, on this rank.
        device: of this rank.
    """
    on_gpu = device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
    mine = torch.tensor([[seconds, psutil.Process().memory_info().rss / 2**30, allocated]], device=device)
    seconds_R, host_R, device_R = gather(mine).T.tolist()
    longest = max(seconds_R)
    return {
        "ranks/slowest": float(seconds_R.index(longest)),
        "ranks/seconds": longest,
        "ranks/waiting_share": 1 - sum(seconds_R) / (len(seconds_R) * longest) if longest else 0.0,
        "ranks/host_gib": max(host_R),
        **({"ranks/device_gib": max(device_R)} if on_gpu else {}),
    }


class RollCall(TrainerCallback):
    """Before each step: all ranks are there, or those that wait say who is not."""

    def __init__(self):
        self.group: Any = torch.distributed.new_group(backend="gloo")

    def on_step_begin(self, args, state, control, **kwargs):
        limit = timedelta(seconds=args.ddp_timeout)
        torch.distributed.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True)
