"""A frozen model that comes to the device and goes back (rlt/models/residence.py): seconds, values, memory."""

import torch

from benchmarks.gpu_check.measures import GIB, forget_peak, held_gib, now
from benchmarks.gpu_check.random_models import random_model
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import Sizes
from rlt.models.residence import resident

VISITS = 3  # of which the first also makes the pinned copies


def run(record: Record, sizes: Sizes, device: str) -> None:
    model = random_model(sizes.residence, device, torch.bfloat16).requires_grad_(False).to("cpu")
    kept = [p.detach().clone() for p in model.parameters()]
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    forget_peak(device)
    before, visits = held_gib(device), []
    for _ in range(VISITS):
        start = now(device)
        with resident(model, device, offload=True):
            there, held = now(device), held_gib(device) - before
            left = now(device)
        visits.append({"there": there - start, "back": now(device) - left, "gib_there": held})
        record.add(gib=size, visits={str(number): visit for number, visit in enumerate(visits, start=1)})
    fastest = min(visit["there"] for visit in visits)
    still = held_gib(device) - before
    record.add(gib_per_second=size / fastest, gib_left_behind=still)
    same = all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    record.claim("the values are what they were", same)
    record.claim("it waits on the CPU", all(p.device.type == "cpu" for p in model.parameters()))
    if device == "cuda":
        record.claim("its memory on the device is free again", still < 0.01 * size)
        record.claim("all of it was there", visits[-1]["gib_there"] > 0.99 * size)
