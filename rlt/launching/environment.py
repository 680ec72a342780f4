"""What a rank finds in its environment: its place among the others, and what accelerate is to make of it."""

import os
import socket
from dataclasses import dataclass

import psutil

from rlt.errors import Refused
from rlt.places import ACCELERATE_CONFIGS

SHARDINGS = {
    "ddp": "ddp",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
    "offload": "deepspeed_zero3_cpu_offloading",
    "fsdp": "fsdp2",
}


@dataclass(frozen=True)
class RankPlace:
    """Where one process stands: `local` of `local_size` on machine `node` of `nodes`."""

    local: int
    local_size: int
    node: int
    nodes: int
    master_addr: str
    master_port: int

    @property
    def rank(self) -> int:
        return self.node * self.local_size + self.local

    @property
    def world_size(self) -> int:
        return self.nodes * self.local_size


def rank_environment(sharding: str, place: RankPlace, on_cpu: bool) -> dict[str, str]:
    """What to add to the environment of a rank."""
    variables = {
        "RANK": place.rank,
        "LOCAL_RANK": place.local,
        "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_size,
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": place.master_port,
        "RLT_SHARDING": sharding,
        "OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // place.local_size),
    }
    if place.nodes > 1 and (name := interface_to(place.master_addr)):
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", name)
    if on_cpu:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**_of_accelerate(sharding), **{name: str(value) for name, value in variables.items()}}


def _of_accelerate(sharding: str) -> dict[str, str]:
    """As `accelerate launch` would set it from the configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = ACCELERATE_CONFIGS / f"{SHARDINGS[sharding]}.yaml"
    # Any number above 1 does: WORLD_SIZE is set above.
    command = ["--config_file", str(file), "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def interface_to(address: str) -> str | None:
    """The network interface by which another machine is reached; gloo would take that of this host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            raise Refused(f"MASTER_ADDR={address} cannot be reached from this machine") from None
        mine = probe.getsockname()[0]
    if mine.startswith("127."):
        raise Refused(f"MASTER_ADDR={address} is this machine's loopback address: name one that the others can reach")
    found = (name for name, places in psutil.net_if_addrs().items() if any(p.address == mine for p in places))
    return next(found, None)


def free_port(wanted: int = 0, host: str = "") -> int:
    """A port that nobody listens at; any when 0 is wanted.

    Raises:
        Refused: the one that is wanted cannot be had.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise Refused(f"{host or 'port'}:{wanted} cannot be had ({error.strerror}): name another") from None
        return probe.getsockname()[1]
