"""NVIDIA GPUs that this server may use: how full and how busy they are, and which of them a worker takes."""

import os
from dataclasses import dataclass

from rlt.planning.machine import ask_nvidia_smi

FIELDS = ("index", "uuid", "name", "memory.used", "memory.total", "utilization.gpu")
MIB = 2**20
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Accelerator:
    index: str
    uuid: str
    name: str
    used_bytes: int
    total_bytes: int
    busy: float  # share of the last moments in which it computed

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


def read_accelerators(lines: list[str]) -> list[Accelerator]:
    """Of nvidia-smi's answer; a figure that a device does not give counts as 0."""
    found = []
    for line in lines:
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(FIELDS):
            used, total, busy = (float(word) if word.replace(".", "").isdigit() else 0.0 for word in words[3:])
            index, uuid, name = words[:3]
            found.append(Accelerator(index, uuid, name, int(used * MIB), int(total * MIB), busy / 100))
    return found


def accelerators() -> list[Accelerator]:
    found = read_accelerators(ask_nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"))
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return found
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [each for each in found if any(name == each.index or each.uuid.startswith(name) for name in names)]


def most_free(found: list[Accelerator], avoid: str | None = None) -> str | None:
    """The device with the most free memory, by its UUID; the one to avoid only where there is no other."""
    if not found:
        return None
    return max(found, key=lambda each: (each.uuid != avoid, each.free_bytes)).uuid
