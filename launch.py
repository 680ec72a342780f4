"""A run on several devices: the tree is composed and planned once, then every rank gets the one resolved configuration.

    ./launch.sh DEVICES [RUN] [ddp | zero1 | zero2 | zero3 | offload | fsdp] [key=value ...]

With NNODES, NODE_RANK and MASTER_ADDR set, and the same command on each machine, DEVICES are those of one machine.
"""

import json
import logging
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from checks import check_keys
from launching import SHARDINGS, RankPlace, folder_lock, rank_environment, supervise
from launching.environment import check_port, free_port
from launching.servers import Servers
from plan import Plan, count_gpus, make_plan
from train import (
    apply_memory_profile,
    apply_warmup,
    compose_config,
    fail,
    is_complete,
    prepare,
    prepare_output,
    prepare_wandb,
)

DEFAULT_PORT = 29500
STARTING = "http://127.0.0.1:0"  # until servers have their ports

logger = logging.getLogger("launch")


@dataclass(frozen=True)
class Machines:
    """This machine among those of the run; port 0: any that is free."""

    nodes: int
    node: int
    master_addr: str
    master_port: int


def read_machines(environment: dict[str, str]) -> Machines:
    """
    Raises:
        ValueError: NNODES, NODE_RANK, MASTER_ADDR or MASTER_PORT do not go together.
    """

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"{name}={text} is not a number")
        return int(text)

    nodes, node, port = number("NNODES", 1), number("NODE_RANK", 0), number("MASTER_PORT", 0)
    if nodes < 1:
        raise ValueError(f"NNODES={nodes} must be above 0")
    if port >= 2**16:
        raise ValueError(f"MASTER_PORT={port} must be below {2**16}")
    if not 0 <= node < nodes:
        raise ValueError(f"NODE_RANK={node} with NNODES={nodes}: it must be in 0 to {nodes - 1}")
    if nodes == 1:
        return Machines(1, 0, "127.0.0.1", port)
    if "MASTER_ADDR" not in environment:
        raise ValueError(f"NNODES={nodes} needs MASTER_ADDR, the address of the machine with NODE_RANK=0")
    if "NODE_RANK" not in environment:
        raise ValueError(f"NNODES={nodes} needs NODE_RANK, 0 to {nodes - 1}, another on each machine")
    return Machines(nodes, node, environment["MASTER_ADDR"], port or DEFAULT_PORT)


def read_servers(arguments: list[str]) -> tuple[int, list[str]]:
    """(devices of servers, the other arguments); launch_with_server.sh puts `--servers=N` first.

    Raises:
        ValueError: N is no number above 0.
    """
    if not arguments or not arguments[0].startswith("--servers="):
        return 0, arguments
    number = arguments[0].removeprefix("--servers=")
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"{number!r} is no number of devices: ./launch_with_server.sh SERVER_DEVICES DEVICES ...")
    return int(number), arguments[1:]


def read_arguments(arguments: list[str], on_cpu: bool) -> tuple[int, str, list[str]]:
    """(devices of this machine, sharding, what is left for the run).

    Raises:
        ValueError: the first word is not a number of devices, or two shardings are named.
    """
    if not arguments or not arguments[0].isdigit() or int(arguments[0]) < 1:
        raise ValueError("usage: ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]; DEVICES is a number above 0")
    named = [word for word in arguments[1:] if word in SHARDINGS]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)}: name one sharding")
    if flags := [word for word in arguments if word.startswith("-")]:
        raise ValueError(
            f"{flags[0]} is for ./launch_mono.sh; here: ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]"
        )
    sharding = named[0] if named else "ddp" if on_cpu else "zero3"
    return int(arguments[0]), sharding, [word for word in arguments[1:] if word not in SHARDINGS]


def check_devices(devices: int, gpus: int, requires: str | None) -> None:
    """
    Raises:
        ValueError: more devices than this machine has.
    """
    if gpus or requires == "gpu":
        if devices > gpus:
            raise ValueError(f"{devices} devices asked for, and {gpus} GPUs are visible on this machine")
    elif devices > len(cores := os.sched_getaffinity(0)):
        raise ValueError(f"{devices} processes asked for, and this machine has {len(cores)} processor cores and no GPU")


def check_servers(config: dict, server_devices: int) -> None:
    """
    Raises:
        ValueError: servers do not fit the run, or tensor parallelism does not fit them.
    """
    if not config.get("use_vllm"):
        raise ValueError(f"use_vllm={config.get('use_vllm')} with servers: use ./launch.sh, or set use_vllm=true")
    parallel = config.get("vllm_tensor_parallel_size", 1)
    fits = [size for size in range(1, server_devices + 1) if server_devices % size == 0]
    if parallel not in fits:
        raise ValueError(
            f"vllm_tensor_parallel_size={parallel} does not divide the {server_devices} devices of the servers: "
            f"use one of {fits}"
        )


def servers_of(plan: Plan, server_devices: int, devices: int, plan_file: Path) -> Servers:
    """On the devices behind those that train."""
    parallel = plan.config.get("vllm_tensor_parallel_size", 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = (visible.split(",") if visible else [str(i) for i in range(plan.gpus)])[devices:] if plan.gpus else []
    groups = [",".join(ids[i : i + parallel]) for i in range(0, server_devices, parallel)]
    threads = max(1, len(os.sched_getaffinity(0)) // (server_devices + devices))
    return Servers(groups, threads, Path(plan.config["output_dir"]) / "logs", plan_file)


def start_ranks(plan: Plan, devices: int, machines: Machines, sharding: str, server_devices: int) -> int:
    """Run a plan on this machine's devices; the exit code."""
    if machines.node == 0 and machines.master_port:
        check_port(machines.master_port)
    port = machines.master_port or free_port()
    places = [
        RankPlace(local, devices, machines.node, machines.nodes, machines.master_addr, port) for local in range(devices)
    ]
    shared = rank_environment(sharding, places[0], on_cpu=not plan.gpus)
    with tempfile.TemporaryDirectory(prefix="rlt-launch-") as folder:
        file = Path(folder) / "plan.json"
        servers = servers_of(plan, server_devices, devices, file) if server_devices else None
        if servers is not None:
            plan.config["vllm_server_base_url"] = servers.urls
            shared |= servers.environment
        file.write_text(json.dumps(asdict(plan)))
        environments = [{**shared, "RANK": str(p.rank), "LOCAL_RANK": str(p.local)} for p in places]
        command = [sys.executable, "-m", "launching.rank", str(file), str(os.getpid())]
        return supervise(command, environments, Path(plan.config["output_dir"]) / "logs", servers)


def launch(devices: int, sharding: str, arguments: list[str], server_devices: int = 0) -> int:
    machines = read_machines(dict(os.environ))
    config, given = compose_config(arguments)
    if not config["dry_run"]:
        check_devices(devices + server_devices, count_gpus(), config["requires"])
    apply_memory_profile(config, given, devices * machines.nodes, sharding)
    check_keys(config)
    warmup = apply_warmup(config, given)
    if server_devices and machines.nodes > 1:
        raise ValueError(f"NNODES={machines.nodes} with servers: for now they and all ranks share one machine")
    if server_devices:
        check_servers(config, server_devices)
        config |= {"use_vllm_server": True, "vllm_server_base_url": STARTING}
    plan = make_plan(config, devices * machines.nodes, pending_warmup=warmup, sharding=sharding)
    if config["dry_run"]:
        sys.stdout.write(f"{yaml.safe_dump(config, sort_keys=True)}\n{plan.report()}\n")
        sys.stdout.writelines(f"warning, missing: {line}\n" for line in plan.missing)
        return 0
    if is_complete(config):
        sys.stdout.write(f"{config['output_dir']} is complete; overwrite_output_dir=true starts again\n")
        return 0
    if warmup is not None:
        logger.info("warm-up first: %s", warmup)
        if code := launch(devices, sharding, [f"run_cfg={warmup}"]):
            return code
    first = machines.node == 0
    with folder_lock(config["output_dir"]) if first else nullcontext():
        if first:
            prepare_output(config)
            prepare_wandb(config)
        logger.info("%s on %d processes, %s\n%s", config["run_name"], plan.devices, sharding, plan.report())
        return start_ranks(plan, devices, machines, sharding, server_devices)


def main() -> None:
    prepare()
    logger.setLevel(logging.INFO)
    try:
        servers, words = read_servers(sys.argv[1:])
        sys.exit(launch(*read_arguments(words, on_cpu=not count_gpus()), servers))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
