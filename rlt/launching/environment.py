"""What the environment says of a run's machines, and what a rank finds there for accelerate and its threads."""

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

DEFAULT_PORT = 29500
LOOPBACK_INTERFACE = "lo"  # linux' name for it
BACKLOG = 2048  # of connections that wait while a server starts


@dataclass(frozen=True)
class Machines:
    """This machine, `node`, among the `least` to `most` of a run; they meet at the address of node 0."""

    least: int = 1
    most: int = 1
    node: int | None = 0  # None: it gets a number from the machine at that address
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT


def read_machines(environment: dict[str, str]) -> Machines:
    """The machines of a run, from the environment.

    Raises:
        Refused: NNODES, NODE_RANK, MASTER_ADDR or MASTER_PORT do not go together.
    """

    def number(name: str, text: str) -> int:
        if not text.isdigit():
            raise Refused(f"{name}={environment[name]} is not a number{' or MIN:MAX' if name == 'NNODES' else ''}")
        return int(text)

    text = environment.get("NNODES", "1")
    least, most = (number("NNODES", part) for part in (text.partition(":")[0], text.rpartition(":")[2]))
    node, port = (
        number(name, environment.get(name, default)) for name, default in (("NODE_RANK", "0"), ("MASTER_PORT", "0"))
    )
    if not 1 <= least <= most:
        raise Refused(f"NNODES={text}: MIN:MAX needs MIN above 0, and MAX not below it")
    if port >= 2**16:
        raise Refused(f"MASTER_PORT={port} must be below {2**16}")
    if node >= most:
        raise Refused(f"NODE_RANK={node} with NNODES={text}: it must be in 0 to {most - 1}")
    if most == 1:
        return Machines()
    if "MASTER_ADDR" not in environment:
        raise Refused(f"NNODES={text} needs MASTER_ADDR, the address of the machine with NODE_RANK=0")
    address = environment["MASTER_ADDR"]
    if "NODE_RANK" not in environment and route_to(address)[0] != socket.gethostbyname(address):
        node = None
    return Machines(least, most, node, address, port or DEFAULT_PORT)


def rank_environment(sharding: str, devices: int, on_cpu: bool, machines: Machines | None = None) -> dict[str, str]:
    """What a rank needs in its environment beside its number: what accelerate is to make of it, and its share.

    Args:
        devices: ranks of this machine.
        machines: of the run; None: unknown, as something else has started the ranks.
    """
    variables = {
        "RLT_SHARDING": sharding,
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // devices)),
    }
    if machines is not None and machines.most == 1:
        variables |= {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    elif machines is not None and (name := route_to(machines.master_addr)[1]):
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", name)
    if on_cpu:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**_of_accelerate(sharding), **variables}


def _of_accelerate(sharding: str) -> dict[str, str]:
    """As `accelerate launch` would set it from the configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = ACCELERATE_CONFIGS / f"{SHARDINGS[sharding]}.yaml"
    # Any number above 1 does: WORLD_SIZE is set above.
    command = ["--config_file", str(file), "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(getattr(defaults, "deepspeed_config", ()))
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def route_to(address: str) -> tuple[str, str | None]:
    """This machine's own address and network interface on the way to another machine.

    Raises:
        Refused: there is none, or it is the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            raise Refused(f"MASTER_ADDR={address} cannot be reached from this machine") from None
        mine = probe.getsockname()[0]
    if mine.startswith("127."):
        raise Refused(f"MASTER_ADDR={address} is this machine's loopback address: name one that the others can reach")
    found = (name for name, places in psutil.net_if_addrs().items() if any(p.address == mine for p in places))
    return mine, next(found, None)  # gloo would take the interface of this host's name


def listen(wanted: int, host: str) -> socket.socket:
    """A port that is this process's from now on; any when 0 is wanted.

    Raises:
        Refused: the one that is wanted cannot be had.
    """
    try:
        return socket.create_server((host, wanted), backlog=BACKLOG)
    except OSError as error:
        raise Refused(f"{host}:{wanted} cannot be had ({error.strerror}): name another") from None


def free_port(host: str = "") -> int:
    """A port that nobody listens at."""
    with listen(0, host) as probe:
        return probe.getsockname()[1]
