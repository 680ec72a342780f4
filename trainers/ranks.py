"""Several processes of one run: how they meet, and what accelerate leaves out on a CPU."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def meet(config: dict[str, Any]) -> None:
    """Wait for the other ranks, for `ddp_timeout` seconds at most, and compare what they were started with.

    Raises:
        ValueError: another configuration somewhere, or an output folder that this machine does not share.
    """
    limit = timedelta(seconds=config.get("ddp_timeout", 1800))
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=limit)
    first, *others = gather_object([config])
    for rank, other in enumerate(others, start=1):
        for key in sorted({*first, *other}):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key}={first.get(key)} on rank 0 and {other.get(key)} on rank {rank}: "
                    "start every machine with the same command"
                )
    if not (Path(config["output_dir"]) / "config.yaml").is_file():
        raise ValueError(
            f"output_dir={config['output_dir']} on rank {state.process_index} is not the folder of rank 0: "
            "choose one that all machines share"
        )


class RollCall(TrainerCallback):
    """Before each step: all ranks are there, or those that wait say who is not."""

    def __init__(self):
        self.group = torch.distributed.new_group(backend="gloo")

    def on_step_begin(self, args, state, control, **kwargs):
        limit = timedelta(seconds=args.ddp_timeout)
        torch.distributed.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True)


def let_fsdp_run_on_cpu() -> None:
    """accelerate takes FSDP for granted on accelerators only, and on a CPU would quietly train with DDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
