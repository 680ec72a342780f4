"""Ranks that something else has started: `torchrun --nproc-per-node 8 train.py [RUN] [SHARDING] [key=value ...]`.

Rank 0 composes, plans and prepares the output folder; the others get the plan through the store at MASTER_ADDR. What
starts torchrun restarts it too: `restarts`, servers and pipelines are for ./launch.sh.
"""

import json
import logging
import os
import time
from datetime import timedelta
from pathlib import Path

from rlt.commands.begin import begin
from rlt.commands.launch import read_words, sharding_of
from rlt.commands.rank import run_rank
from rlt.errors import Refused, fail
from rlt.jobs import DEFAULT_LIMIT_S
from rlt.launching.environment import Machines, free_port, rank_environment
from rlt.planning.configuration import compose_config
from rlt.planning.plan import Plan
from rlt.planning.resolve import Resolved, resolve
from rlt.survival.kill_points import RESTART_VARIABLE
from rlt.survival.stop_signals import PEERS_VARIABLE

PLACE = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # what says what is so
PLAN = "plan"  # in the store: what rank 0 made of the command line; empty: there is nothing to run
FOLDER = "folder"  # what rank 0 drew in the output folder
PORT = "port"  # where ranks meet at rank 0
LOOK_S = 0.2  # between two looks at the store

logger = logging.getLogger("rlt")


def is_rank() -> bool:
    """Whether this process was started as one rank of several."""
    return os.environ.keys() >= PLACE


def forget_place() -> None:
    """Variables that a job's controller or an MPI leaves in the environment of a run that is one process: libraries
    would wait for the others."""
    for name in [name for name in os.environ if name in PLACE or name.startswith(("PMI_", "OMPI_COMM_", "MV2_COMM_"))]:
        value = os.environ.pop(name)
        if value != ALONE.get(name):
            logger.info("%s=%s in the environment is ignored: this is a run of one process", name, value)


def main(arguments: list[str]) -> int:
    """Run as one rank; the exit code."""
    from rlt.launching.meeting import draw  # torch

    store = open_store()  # held until the run's end: at rank 0 it may be the one where all ranks meet
    if os.environ["RANK"] != "0":
        try:
            heard = hear(store)
        except Refused as error:
            fail(error)
        return run(heard, store) if heard else 1
    told = False

    def start(plan: Plan) -> int:
        nonlocal told
        told = True
        store.set(FOLDER, draw(Path(plan.config["output_dir"])))
        store.set(PLAN, plan.to_json())  # secrets are for what rank 0 does alone
        logger.info("%s on %d processes, %s\n%s", plan.config["run_name"], plan.devices, plan.sharding, plan.report())
        return run(plan, store)

    try:
        return begin(resolve_here(arguments), lambda _: 1, start)
    except Refused as error:
        fail(error)
    finally:
        if not told:
            store.set(PLAN, "")


def resolve_here(arguments: list[str]) -> Resolved:
    """The plan of a command line for the ranks that there are.

    Raises:
        Refused: the run cannot work, or takes more than ranks.
    """
    named, words = read_words(arguments, "torchrun ... train.py")
    config, given = compose_config(words)
    sharding = sharding_of(config, named)
    if config.get("stages"):
        raise Refused(f"{config['run_name']} with torchrun: start its stages one by one, or all with ./launch.sh")
    if config["restarts"]:
        raise Refused(f"restarts={config['restarts']} is for ./launch.sh: torchrun has --max-restarts")
    if config.get("use_vllm_server") and not config.get("vllm_server_base_url"):
        raise Refused(
            "use_vllm_server=true with torchrun: start servers with ./launch_with_server.sh SERVER_DEVICES 0, and name "
            "them in vllm_server_base_url"
        )
    if os.environ.get(RESTART_VARIABLE, "0") != "0":
        config["overwrite_output_dir"] = False  # that was done before the first start
    resolved = resolve(config, given, int(os.environ["WORLD_SIZE"]), sharding)
    if resolved.warmup and not config["dry_run"]:
        raise Refused(
            f"{config['run_name']} starts from {config['warmup_run']}, which has yet to run: run "
            f"'{' '.join(resolved.warmup)}' first, or name model_name_or_path"
        )
    return resolved


def run(plan: Plan, store) -> int:
    leave_agent_store(store)
    on_cpu = not plan.gpus
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    alone = Machines() if here == plan.devices else None
    os.environ.update(rank_environment(plan.sharding or "ddp", here, on_cpu, alone))
    os.environ[PEERS_VARIABLE] = "1"
    run_rank(lambda: plan)
    return 0


def leave_agent_store(store) -> None:
    """Ranks meet at a store of their own life: torchrun's still has what those of an earlier one left there, addresses
    where nobody listens (https://github.com/pytorch/pytorch/issues/135712)."""
    if os.environ["RANK"] == "0":
        store.set(PORT, str(free_port()))
    os.environ |= {"MASTER_PORT": store.get(PORT).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def open_store():
    """The store where ranks meet, in a part of its own for each life of theirs."""
    from torch.distributed import PrefixStore, TCPStore

    held_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not held_elsewhere,
        timeout=timedelta(seconds=DEFAULT_LIMIT_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"rlt/{os.environ.get(RESTART_VARIABLE, '0')}/{os.environ['WORLD_SIZE']}", store)


def hear(store) -> Plan | None:
    """What rank 0 made of the command line, once it has prepared the run; None where there is nothing to run.

    Raises:
        Refused: rank 0 took too long, or its output folder is not this machine's.
    """
    from torch.distributed import DistNetworkError

    from rlt.launching.meeting import check_same

    try:
        wait_for(PLAN, store)
        word = store.get(PLAN).decode()
        drawn = store.get(FOLDER).decode() if word else ""
    except DistNetworkError:  # who ended rank 0, or rank 0 itself, has said why
        logger.warning("rank 0 has ended: there is nothing to run")
        return None
    if not word:
        return None
    plan = Plan(**json.loads(word))
    check_same(Path(plan.config["output_dir"]), drawn)
    return plan


def wait_for(key: str, store) -> None:
    """Return once the store has the key. A `get` would hold signals back until it returns: these are heard between two
    looks.

    Raises:
        Refused: the key did not come in time.
    """
    until = time.monotonic() + DEFAULT_LIMIT_S
    while not store.check([key]):
        if time.monotonic() > until:
            raise Refused(f"rank 0 was not ready within {DEFAULT_LIMIT_S} s")
        time.sleep(LOOK_S)
