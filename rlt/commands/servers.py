"""Servers alone, for a run on other machines: `./launch_with_server.sh SERVER_DEVICES 0 [RUN] [key=value ...]`."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rlt.commands.begin import show
from rlt.errors import Refused
from rlt.launching.lifetime import stop_signals
from rlt.launching.owned import SERVE, owned_folder
from rlt.launching.servers import HOST_VARIABLE, LOOPBACK, PORT_VARIABLE, Servers, answers
from rlt.launching.watchdog import Watchdog
from rlt.places import KEY_VARIABLE
from rlt.planning.configuration import compose_config
from rlt.planning.machine import check_devices
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.schema import IPC

SHORTEST_KEY = 16  # characters: of hexadecimal ones, 64 bits

logger = logging.getLogger("rlt")


def serve(devices: int, arguments: list[str]) -> int:
    """Servers alone, for a run on other machines, until a signal comes; the exit code."""
    config, given = compose_config(arguments)
    config = {**config, "overwrite_output_dir": True}  # the trainer's folder
    resolved = resolve(config, given, server_devices=devices, trains_here=False)
    plan, config = resolved.plan, resolved.plan.config
    if config["dry_run"]:
        show(plan)
        return 0
    if resolved.warmup:
        raise Refused(
            f"{config['run_name']} starts from {config['warmup_run']}, which has yet to run: name model_name_or_path"
        )
    check_devices(devices, plan.gpus, config["requires"])
    with owned_folder(SERVE) as folder, Watchdog() as watchdog:
        watchdog.watch(Path(folder))
        file = Path(folder) / "plan.json"
        file.write_text(plan.to_json(), encoding="utf-8")
        servers = servers_of(plan, devices, 0, file, Path(folder), watchdog)
        return serve_until_stopped(servers, config["vllm_server_timeout"])


def servers_of(
    plan: Plan, server_devices: int, devices: int, plan_file: Path, logs: Path, watchdog: Watchdog
) -> Servers:
    """On the devices behind those that train, or on these where weights are handed over in their memory."""
    shares = plan.config.get("weight_transfer") == IPC
    parallel = plan.config.get("vllm_tensor_parallel_size", 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = (visible.split(",") if visible else [str(i) for i in range(plan.gpus)]) if plan.gpus else []
    ids = ids[0 if shares else devices :]
    groups = [",".join(ids[i : i + parallel]) for i in range(0, server_devices, parallel)]
    threads = max(1, len(os.sched_getaffinity(0)) // (server_devices + devices))
    where = address_of_servers(dict(os.environ))
    asked_for = {HOST_VARIABLE, PORT_VARIABLE} & os.environ.keys()
    sockets = plan_file.parent if devices and not asked_for else None  # where only this machine's ranks ask them
    return Servers(groups, threads, logs, plan_file, **where, sockets=sockets, watchdog=watchdog)


def address_of_servers(environment: dict[str, str]) -> dict:
    """Where servers listen: `host` and `first_port`.

    Raises:
        Refused: other machines could reach them, and no key is set; or one that can be guessed.
    """
    host, port = environment.get(HOST_VARIABLE, LOOPBACK), environment.get(PORT_VARIABLE, "0")
    if not port.isdigit() or int(port) >= 2**16:
        raise Refused(f"{PORT_VARIABLE}={port} is no port")
    if not host.startswith("127.") and not environment.get(KEY_VARIABLE):
        raise Refused(f"{HOST_VARIABLE}={host} is open to others: set {KEY_VARIABLE} here and where you train")
    if 0 < (length := len(environment.get(KEY_VARIABLE, ""))) < SHORTEST_KEY:
        raise Refused(
            f"{KEY_VARIABLE} has {length} characters, which can be guessed: take at least {SHORTEST_KEY}, such as "
            "those of `openssl rand -hex 16`"
        )
    return {"host": host, "first_port": int(port)}


def serve_until_stopped(servers: Servers, limit_s: float) -> int:
    """Servers without ranks: says where they are once they are ready; the exit code after SIGTERM or Ctrl-C.

    Args:
        limit_s: for them to be ready.
    """
    stopped = threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stopped.set())
    try:
        servers.start()
        give_up = time.monotonic() + limit_s
        while not all(answers(url) for url in servers.urls):
            if servers.given_up.is_set() or stopped.wait(1.0):
                break
            if time.monotonic() > give_up:
                raise Refused(f"servers are not ready after vllm_server_timeout={limit_s:.0f} seconds")
        else:
            logger.warning("ready; train with use_vllm_server=true vllm_server_base_url=[%s]", ",".join(servers.urls))
        while not servers.given_up.is_set() and not stopped.wait(0.5):
            pass
    finally:
        servers.close()
    if servers.given_up.is_set():
        sys.stderr.write(servers.last_words())
        return 1
    return 0
