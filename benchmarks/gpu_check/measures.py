"""Seconds, memory and rates of a device."""

import gc
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch._dynamo.utils import compilation_time_metrics, counters

GIB = 2**30
PRODUCTS = 6  # of which the fastest counts


def now(device: str) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(device: str, work: Callable[[], object]) -> float:
    start = now(device)
    work()
    return now(device) - start


def forget_peak(device: str) -> None:
    """Peaks count from here; a CPU's are those of the process, from its start."""
    gc.collect()  # trainers stand in circles
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_gib(device: str) -> float:
    """What is allocated on the GPU now; on the CPU, the largest resident set so far."""
    return torch.cuda.memory_allocated() / GIB if device == "cuda" else peak_gib(device)


def peak_gib(device: str) -> float:
    """Most that was allocated on the GPU; on the CPU, the largest resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def matrix_rate(device: str, side: int) -> float:
    """FLOP/s of bfloat16 products of square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds_of(device, lambda: a @ b) for _ in range(PRODUCTS))
    return 2 * side**3 / best


def autocast(device: str) -> AbstractContextManager:
    """As the trainers compute."""
    return torch.autocast(device, torch.bfloat16)


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def compile_seconds() -> float:
    """That torch.compile took for their forward passes; a backward pass is compiled at its first call."""
    return sum(compilation_time_metrics.get("_compile.compile_inner", ()))
