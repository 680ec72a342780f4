"""The states of all random generators that training draws from, taken and set again."""

import random
from typing import Any

import numpy
import torch


def random_state() -> tuple[Any, ...]:
    """Of Python, NumPy, and torch on the CPU and on each GPU."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), on_gpus


def set_random_state(state: tuple[Any, ...]) -> None:
    """What `random_state` gave."""
    of_python, of_numpy, of_torch, on_gpus = state
    random.setstate(of_python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    for device, of_gpu in enumerate(on_gpus):
        torch.cuda.set_rng_state(of_gpu, device)
