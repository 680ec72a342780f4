"""A run on several devices: the tree is composed and planned once, then every rank gets the one resolved configuration.

    ./launch.sh DEVICES [RUN] [ddp | zero1 | zero2 | zero3 | offload | fsdp] [key=value ...]

With NNODES and MASTER_ADDR set, and the same command on each machine, DEVICES are those of one machine.
NNODES=MIN:MAX goes on with the machines that are left, and with those that come back.
"""

import json
import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlt.commands.begin import begin, prepare_process
from rlt.commands.servers import serve, servers_of
from rlt.errors import Refused, fail
from rlt.generation.shared_memory import weights_folder
from rlt.jobs import DEFAULT_LIMIT_S, run_plan
from rlt.jobs.child import run_child, secret_overrides
from rlt.launching.environment import SHARDINGS, Machines, rank_environment, read_machines
from rlt.launching.owned import LAUNCH, owned_folder
from rlt.launching.watchdog import Watchdog
from rlt.places import KEY_VARIABLE, RANK_SECRETS_VARIABLE, WEIGHTS_VARIABLE
from rlt.planning.configuration import compose_config
from rlt.planning.machine import check_devices, count_gpus
from rlt.planning.memory import parameters
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.planning.transfer import KEY, devices_of_both
from rlt.runs.folder import LOGS
from rlt.runs.hidden import hide_secrets
from rlt.schema import IPC, PROFILES, profile_of

RANK = ("-m", "rlt.commands.rank")

logger = logging.getLogger("rlt")


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


USAGE = "./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]"


def read_arguments(arguments: list[str]) -> tuple[int, str | None, list[str]]:
    """(devices of this machine, sharding if one is named, what is left for the run).

    Raises:
        Refused: the first word is not a number of devices, or two shardings are named.
    """
    if not arguments or not arguments[0].isdigit():
        raise Refused(f"usage: {USAGE}; DEVICES is a number above 0")
    return int(arguments[0]), *read_words(arguments[1:], USAGE)


def read_words(words: list[str], usage: str) -> tuple[str | None, list[str]]:
    """(sharding if one is named, what is left for the run).

    Raises:
        Refused: two shardings are named, or a flag.
    """
    named = [word for word in words if word in SHARDINGS]
    if len(named) > 1:
        raise Refused(f"{' and '.join(named)}: name one sharding")
    if flags := [word for word in words if word.startswith("-")]:
        raise Refused(f"{flags[0]} is for ./launch_mono.sh; here: {usage}")
    return named[0] if named else None, [word for word in words if word not in SHARDINGS]


def sharding_of(config: dict, named: str | None) -> str:
    """The sharding of a run: as named, else what suits its devices.

    Raises:
        Refused: one is named where nothing is trained.
    """
    profile = PROFILES.get(config["trainer"])  # an unknown one is refused by the plan
    if profile and profile.prepares:
        raise Refused(f"{config['run_name']} uses no devices: ./launch_mono.sh, or engine=slurm or ray for machines")
    if profile and not profile.trains and not profile.stages:
        if named not in (None, "ddp"):
            raise Refused(f"{named} with {config['run_name']}: nothing is trained, and every device has whole models")
        return "ddp"
    return named or ("zero3" if count_gpus() or config["requires"] == "gpu" else "ddp")


def launch(devices: int, sharding: str | None, arguments: list[str], server_devices: int = 0) -> int:
    """Plan a run and start it on this machine's devices, together with the other machines; the exit code."""
    machines = read_machines(dict(os.environ))
    config, given = compose_config(arguments)
    sharding = sharding_of(config, sharding)
    meeting, compare = None, lambda _: None
    if machines.most > 1 and not config["dry_run"]:
        # A stranger's bytes at the machines' store are 2 kB of warning, which fill a log, or a pipe that nobody reads:
        # then the store stands still, and with it the run. Read when torch is imported, here and by the ranks.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from rlt.launching.meeting import Meeting

        meeting = Meeting(machines, config["output_dir"], config.get("ddp_timeout", DEFAULT_LIMIT_S))
        nodes = f"{machines.least}:{machines.most}"
        compare = partial(
            meeting.compare, {**hide_secrets(config), "sharding": sharding, "devices": devices, "NNODES": nodes}
        )
    try:
        check_machine(config, devices, machines, server_devices)
        resolved = resolve(config, given, devices * machines.most, sharding, server_devices)
        fewer = plans_of_fewer(config, given, devices, sharding, machines)
    except Refused as error:
        compare(str(error))
        raise
    compare("")

    def start(plan: Plan) -> int:
        if plan.profile.stages:
            run_plan(plan)
            return 0
        logger.info("%s on %d processes, %s\n%s", plan.config["run_name"], plan.devices, plan.sharding, plan.report())
        return start_ranks({machines.most: plan, **fewer}, devices, machines, server_devices, meeting)

    first = partial(warm_up, devices, sharding, machines)
    return begin(resolved, first, start, holds_folder=machines.node == 0)


def warm_up(devices: int, sharding: str, machines: Machines, arguments: list[str]) -> int:
    """The run that goes first: on the same devices; a preparation, which uses none, as one process.

    Raises:
        Refused: a preparation is to go first, and several machines would wait for it.
    """
    if not profile_of(compose_config(arguments)[0]).prepares:
        return launch(devices, sharding, arguments)
    if machines.most > 1:
        raise Refused(f"NNODES={machines.most}: the preparation has yet to run, run it first: {' '.join(arguments)}")
    run_child(["train.py", *arguments])
    return 0


def check_machine(config: dict, devices: int, machines: Machines, server_devices: int) -> None:
    """Refuse what this machine has not, and what only one machine can do.

    Raises:
        Refused: too many devices; servers of its own, memory handed over, or a pipeline, on several machines.
    """
    if not config["dry_run"]:
        check_devices(devices_of_both(config, count_gpus(), devices, server_devices), count_gpus(), config["requires"])
    nodes = machines.most
    if nodes > 1 and server_devices:
        raise Refused(
            f"NNODES={nodes} with servers of its own: start those with ./launch_with_server.sh {server_devices} 0, "
            "and every machine with ./launch.sh and vllm_server_base_url=[http://HOST:PORT,...]"
        )
    if nodes > 1 and config.get(KEY) == IPC:
        raise Refused(f"{KEY}={IPC} with NNODES={nodes}: memory is handed over within one machine; set {KEY}=nccl")
    if nodes > 1 and config.get("stages"):
        raise Refused(f"{config['run_name']} with NNODES={nodes}: start its stages one by one")


def plans_of_fewer(config: dict, given: list[str], devices: int, sharding: str, machines: Machines) -> dict[int, Plan]:
    """By their number, for as many machines as may be left.

    Raises:
        Refused: the least number of them does not divide the batch; for those in between, a warning says it.
    """
    plans = {}
    for fewer in range(machines.most - 1, machines.least - 1, -1):
        try:
            plans[fewer] = resolve(config, given, devices * fewer, sharding).plan
        except Refused as error:
            if fewer == machines.least:
                raise Refused(f"NNODES={machines.least}:{machines.most}, with {fewer} machines: {error}") from None
            logger.warning("with %d machines left the run will end: %s", fewer, error)
    return plans


def start_ranks(plans: dict[int, Plan], devices: int, machines: Machines, server_devices: int, meeting) -> int:
    """Run a plan on this machine's devices; the exit code.

    Args:
        plans: by the number of machines.
        meeting: with the other machines (`rlt.launching.meeting.Meeting`), or None.

    Raises:
        Refused: the machines do not share the output folder, or node 0 has ended.
    """
    from rlt.launching.agent import run_ranks

    plan = plans[machines.most]
    output = Path(plan.config["output_dir"])
    if meeting is not None:
        meeting.start(output)
    environment = rank_environment(plan.sharding or "ddp", devices, not plan.gpus, machines)
    size = int(parameters(plan.config) * 4)
    served = weights_folder(size) if plan.config.get("use_vllm_server") else nullcontext()
    with owned_folder(LAUNCH) as folder, served as weights, Watchdog() as watchdog:
        for left in filter(None, (folder, weights)):
            watchdog.watch(Path(left))
        servers = None
        if server_devices:
            servers = servers_of(plan, server_devices, devices, Path(folder) / "plan-1.json", output / LOGS, watchdog)
            plans = {1: replace(plan, config={**plan.config, "vllm_server_base_url": servers.urls})}
            environment[KEY_VARIABLE] = servers.key
        if weights is not None:
            environment[WEIGHTS_VARIABLE] = weights
        for number, plan in plans.items():
            (Path(folder) / f"plan-{number}.json").write_text(plan.to_json(), encoding="utf-8")
        environment[RANK_SECRETS_VARIABLE] = json.dumps(plans[machines.most].secrets)
        environment["TMPDIR"] = folder  # where libraries leave files when a rank is killed
        command = [sys.executable, *RANK, folder, str(os.getpid())]
        restarts = plan.config["restarts"]
        words = Path(folder)
        return run_ranks(command, devices, output / LOGS, environment, words, restarts, servers, meeting, watchdog)


def main() -> None:
    prepare_process()
    if not sys.argv[1:]:
        fail(Refused(f"usage: {USAGE}"), 2)
    try:
        servers, words = read_servers(sys.argv[1:])
        devices, sharding, rest = read_arguments([*words, *secret_overrides()])
        if servers and not devices:
            sys.exit(serve(servers, rest))
        if not devices:
            raise Refused("0 devices: only servers can do without (./launch_with_server.sh SERVER_DEVICES 0 RUN)")
        sys.exit(launch(devices, sharding, rest, servers))
    except Refused as error:
        fail(error)
