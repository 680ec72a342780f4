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
from dataclasses import asdict
from pathlib import Path

from checks import JOBS, check_keys
from configuration import apply_memory_profile, apply_warmup, compose_config
from errors import Refused, fail
from generation.guard import KEY_VARIABLE
from generation.shared_memory import WEIGHTS_VARIABLE, weights_folder
from launching import SHARDINGS, RankPlace, folder_lock, rank_environment, supervise
from launching.environment import free_port
from launching.machines import Link, Machines, read_machines
from launching.servers import HOST_VARIABLE, LOOPBACK, PORT_VARIABLE, Servers, serve_until_stopped
from memory import parameters
from pipeline import check as check_pipeline
from pipeline import run as run_pipeline
from plan import Plan, count_gpus, hide_secrets, is_complete, make_plan
from train import prepare, prepare_output, prepare_wandb, show

STARTING = "http://127.0.0.1:0"  # until servers have their ports

logger = logging.getLogger("launch")


def read_servers(arguments: list[str]) -> tuple[int, list[str]]:
    """(devices of servers, the other arguments); launch_with_server.sh puts `--servers=N` first.

    Raises:
        Refused: N is no number above 0.
    """
    if not arguments or not arguments[0].startswith("--servers="):
        return 0, arguments
    number = arguments[0].removeprefix("--servers=")
    if not number.isdigit() or int(number) < 1:
        raise Refused(f"{number!r} is no number of devices: ./launch_with_server.sh SERVER_DEVICES DEVICES ...")
    return int(number), arguments[1:]


def read_arguments(arguments: list[str]) -> tuple[int, str | None, list[str]]:
    """(devices of this machine, sharding if one is named, what is left for the run).

    Raises:
        Refused: the first word is not a number of devices, or two shardings are named.
    """
    if not arguments or not arguments[0].isdigit():
        raise Refused("usage: ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]; DEVICES is a number above 0")
    named = [word for word in arguments[1:] if word in SHARDINGS]
    if len(named) > 1:
        raise Refused(f"{' and '.join(named)}: name one sharding")
    if flags := [word for word in arguments if word.startswith("-")]:
        raise Refused(f"{flags[0]} is for ./launch_mono.sh; here: ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]")
    return int(arguments[0]), named[0] if named else None, [word for word in arguments[1:] if word not in SHARDINGS]


def check_devices(devices: int, gpus: int, requires: str | None) -> None:
    """Refuse more devices than this machine has.

    Raises:
        Refused: more devices than this machine has.
    """
    if gpus or requires == "gpu":
        if devices > gpus:
            raise Refused(f"{devices} devices asked for, and {gpus} GPUs are visible on this machine")
    elif devices > len(cores := os.sched_getaffinity(0)):
        raise Refused(f"{devices} processes asked for, and this machine has {len(cores)} processor cores and no GPU")


def check_servers(config: dict, server_devices: int, nodes: int = 1) -> None:
    """Refuse servers that do not fit the run.

    Raises:
        Refused: servers do not fit the run, or tensor parallelism does not fit them.
    """
    if nodes > 1:
        raise Refused(
            f"NNODES={nodes} with servers of its own: start those with ./launch_with_server.sh {server_devices} 0, "
            "and every machine with ./launch.sh and vllm_server_base_url=[http://HOST:PORT,...]"
        )
    if config["trainer"] == "pipeline":
        raise Refused("a pipeline with servers: start its stages one by one")
    if not config.get("use_vllm", config["trainer"] in JOBS):
        raise Refused(f"use_vllm={config.get('use_vllm')} with servers: use ./launch.sh, or set use_vllm=true")
    parallel = config.get("vllm_tensor_parallel_size", 1)
    fits = [size for size in range(1, server_devices + 1) if server_devices % size == 0]
    if parallel not in fits:
        raise Refused(
            f"vllm_tensor_parallel_size={parallel} does not divide the {server_devices} devices of the servers: "
            f"use one of {fits}"
        )


def servers_of(plan: Plan, server_devices: int, devices: int, plan_file: Path, logs: Path) -> Servers:
    """On the devices behind those that train."""
    parallel = plan.config.get("vllm_tensor_parallel_size", 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = (visible.split(",") if visible else [str(i) for i in range(plan.gpus)])[devices:] if plan.gpus else []
    groups = [",".join(ids[i : i + parallel]) for i in range(0, server_devices, parallel)]
    threads = max(1, len(os.sched_getaffinity(0)) // (server_devices + devices))
    return Servers(groups, threads, logs, plan_file, **address_of_servers(dict(os.environ)))


def address_of_servers(environment: dict[str, str]) -> dict:
    """Where servers listen: `host` and `first_port`.

    Raises:
        Refused: other machines could reach them, and no key is set.
    """
    host, port = environment.get(HOST_VARIABLE, LOOPBACK), environment.get(PORT_VARIABLE, "0")
    if not port.isdigit() or int(port) >= 2**16:
        raise Refused(f"{PORT_VARIABLE}={port} is no port")
    if not host.startswith("127.") and not environment.get(KEY_VARIABLE):
        raise Refused(f"{HOST_VARIABLE}={host} is open to others: set {KEY_VARIABLE} here and where you train")
    return {"host": host, "first_port": int(port)}


def serve(devices: int, arguments: list[str]) -> int:
    """Servers alone, for a run on other machines, until a signal comes; the exit code."""
    config, given = compose_config(arguments)
    apply_memory_profile(config, given)
    check_keys(config)
    check_servers(config, devices)
    if apply_warmup(config, given):
        raise Refused(
            f"{config['run_name']} starts from {config['warmup_run']}, which has yet to run: name model_name_or_path"
        )
    check_devices(devices, count_gpus(), config["requires"])
    plan = make_plan({**config, "overwrite_output_dir": True})  # its folder is the trainer's
    if config["dry_run"]:
        show(plan)
        return 0
    with tempfile.TemporaryDirectory(prefix="rlt-serve-") as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(asdict(plan)))
        servers = servers_of(plan, devices, 0, file, Path(folder))
        return serve_until_stopped(servers, config["vllm_server_timeout"])


def start_ranks(
    plan: Plan, devices: int, machines: Machines, sharding: str, server_devices: int, link: Link | None
) -> int:
    """Run a plan on this machine's devices; the exit code."""
    port = free_port()
    if link is not None:
        port = link.agree(port)
        check_shared(plan.config["output_dir"])
    places = [
        RankPlace(local, devices, machines.node, machines.nodes, machines.master_addr, port) for local in range(devices)
    ]
    shared = rank_environment(sharding, places[0], on_cpu=not plan.gpus)
    size = int(parameters(plan.config) * 4)
    served = weights_folder(size) if plan.config.get("use_vllm_server") else nullcontext()
    with tempfile.TemporaryDirectory(prefix="rlt-launch-") as folder, served as weights:
        file = Path(folder) / "plan.json"
        logs = Path(plan.config["output_dir"]) / "logs"
        servers = servers_of(plan, server_devices, devices, file, logs) if server_devices else None
        if servers is not None:
            plan.config["vllm_server_base_url"] = servers.urls
            shared[KEY_VARIABLE] = servers.key
        if weights is not None:
            shared[WEIGHTS_VARIABLE] = weights
        file.write_text(json.dumps(asdict(plan)))
        environments = [{**shared, "RANK": str(p.rank), "LOCAL_RANK": str(p.local)} for p in places]
        command = [sys.executable, "-m", "launching.rank", str(file), str(os.getpid())]
        return supervise(command, environments, logs, servers, link)


def check_shared(folder: str) -> None:
    """Refuse an output folder that the machines do not share.

    Raises:
        Refused: node 0 has written its configuration elsewhere.
    """
    if not (Path(folder) / "config.yaml").is_file():
        raise Refused(f"output_dir={folder} is not the folder of NODE_RANK=0: choose one that all machines share")


def sharding_of(config: dict, named: str | None) -> str:
    """The sharding of a run: as named, else what suits its devices.

    Raises:
        Refused: one is named where nothing is trained.
    """
    if config["trainer"] in JOBS and config["trainer"] != "pipeline":
        if named not in (None, "ddp"):
            raise Refused(f"{named} with {config['run_name']}: nothing is trained, and every device has whole models")
        return "ddp"
    return named or ("zero3" if count_gpus() or config["requires"] == "gpu" else "ddp")


def launch(devices: int, sharding: str | None, arguments: list[str], server_devices: int = 0) -> int:
    """Plan a run and start it on this machine's devices, together with the other machines; the exit code."""
    machines = read_machines(dict(os.environ))
    config, given = compose_config(arguments)
    sharding = sharding_of(config, sharding)
    if machines.nodes == 1 or config["dry_run"]:
        return launch_here(config, given, devices, sharding, server_devices, machines, None)
    link = Link(machines, config.get("ddp_timeout", 1800))
    link.meet({**hide_secrets(config), "sharding": sharding, "devices": devices})
    try:
        return launch_here(config, given, devices, sharding, server_devices, machines, link)
    except Refused as error:
        link.announce(str(error))
        raise


def launch_here(
    config: dict,
    given: list[str],
    devices: int,
    sharding: str,
    server_devices: int,
    machines: Machines,
    link: Link | None,
) -> int:
    if not config["dry_run"]:
        check_devices(devices + server_devices, count_gpus(), config["requires"])
    apply_memory_profile(config, given, devices * machines.nodes, sharding)
    check_keys(config)
    warmup = apply_warmup(config, given, devices * machines.nodes, sharding)
    if server_devices:
        check_servers(config, server_devices, machines.nodes)
        config |= {"use_vllm_server": True, "vllm_server_base_url": STARTING}
    plan = make_plan(config, devices * machines.nodes, warmup is not None, sharding)
    if config["dry_run"]:
        show(plan, sharding)
        return 0
    if is_complete(config):
        sys.stdout.write(f"{config['output_dir']} is complete; overwrite_output_dir=true starts again\n")
        return 0
    if warmup is not None:
        logger.info("warm-up first: %s", " ".join(warmup))
        if code := launch(devices, sharding, warmup):
            return code
    if config["trainer"] == "pipeline":
        if machines.nodes > 1:
            raise Refused(f"{config['run_name']} with NNODES={machines.nodes}: start its stages one by one")
        check_pipeline(plan, devices, sharding)
    first = machines.node == 0
    with folder_lock(config["output_dir"]) if first else nullcontext():
        if first:
            prepare_output(config)
            prepare_wandb(config)
        if config["trainer"] == "pipeline":
            run_pipeline(plan, devices, sharding)
            return 0
        logger.info("%s on %d processes, %s\n%s", config["run_name"], plan.devices, sharding, plan.report())
        return start_ranks(plan, devices, machines, sharding, server_devices, link)


def main() -> None:
    prepare()
    logger.setLevel(logging.INFO)
    try:
        servers, words = read_servers(sys.argv[1:])
        devices, sharding, rest = read_arguments(words)
        if servers and not devices:
            sys.exit(serve(servers, rest))
        if not devices:
            raise Refused("0 devices: only servers can do without (./launch_with_server.sh SERVER_DEVICES 0 RUN)")
        sys.exit(launch(devices, sharding, rest, servers))
    except Refused as error:
        fail(error)


if __name__ == "__main__":
    main()
