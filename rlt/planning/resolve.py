"""A command line becomes a plan: memory profile, keys, warm-up, servers, checks, in one place for all doors."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlt.errors import Refused
from rlt.planning.checks import check_keys, check_server_devices
from rlt.planning.configuration import compose_config, named_keys, quoted
from rlt.planning.distill_checks import check_models
from rlt.planning.machine import count_gpus
from rlt.planning.plan import Plan, make_plan
from rlt.planning.profiles import with_memory_profile
from rlt.planning.transfer import with_weight_transfer
from rlt.planning.trl_fields import typed_settings
from rlt.runs.folder import MARKER, check_output, is_complete
from rlt.runs.trackers import as_override
from rlt.schema import DistillSettings, profile_of

STARTING = "http://127.0.0.1:0"  # the address of servers until they have their ports

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Resolved:
    """A command line that was found possible, and the arguments of the warm-up that has to run first, if one has."""

    plan: Plan
    warmup: list[str] | None


def resolve(
    config: dict[str, Any],
    given: list[str],
    devices: int = 1,
    sharding: str | None = None,
    server_devices: int = 0,
    list_missing: bool | None = None,
    trains_here: bool = True,
) -> Resolved:
    """The plan of a composed configuration, which is not changed.

    Args:
        config: flat, as `compose_config` gives it.
        given: the overrides of the command line; keys that it names are left as they are.
        devices: processes that train, on all machines.
        sharding: over them; None: one process, without the launcher.
        server_devices: that the launcher gives to servers of its own.
        list_missing: as in `make_plan`.
        trains_here: beside the servers; else they are for ranks elsewhere.

    Raises:
        Refused: one line on the first thing that cannot work.
    """
    config = with_memory_profile(config, given, devices, sharding or "ddp")
    check_keys(config)
    config, warmup = with_warmup(config, given, devices, sharding or "ddp")
    if server_devices:
        check_server_devices(typed_settings(config), server_devices)
        config = {**config, "use_vllm_server": True, "vllm_server_base_url": STARTING}
    config = with_weight_transfer(config, count_gpus(), devices if trains_here else 0, server_devices)
    plan = make_plan(config, devices, warmup is not None, sharding, list_missing)
    if warmup is not None and isinstance(plan.settings, DistillSettings):
        first, _ = compose_config(warmup)
        check_models(replace(plan.settings, model_name_or_path=first["model_name_or_path"]))
    return Resolved(plan, warmup)


def with_warmup(
    config: dict[str, Any], given: list[str], devices: int = 1, sharding: str = "ddp"
) -> tuple[dict[str, Any], list[str] | None]:
    """The run as it starts from its warm-up's model, unless a model was named; and the arguments of a warm-up that has
    yet to run. A preparation is one too: the run then starts from its rows.

    Of the run's own keys a warm-up takes only where results and logs go, and how often ranks restart; its micro-batch
    has to fit the devices.

    Raises:
        Refused: the warm-up cannot run on these devices, or another run stands in its folder.
    """
    key = "dataset_id_or_path" if profile_of(config).learns_from == "text" else "model_name_or_path"
    if config["warmup_run"] is None or named_keys(given) & {key, "model_cfg"}:
        return config, None
    name = config["warmup_run"]
    arguments = [f"run_cfg={name}", f"results_dir={quoted(config['results_dir'])}"]
    arguments.append(as_override(config))
    if config["restarts"]:
        arguments.append(f"restarts={config['restarts']}")
    first, _ = compose_config(arguments)
    config = {**config, key: first["output_dir"]}
    prepares = profile_of(first).prepares
    if prepares:  # in one process, which nothing watches over
        arguments = [argument for argument in arguments if not argument.startswith("restarts=")]
    try:
        if is_complete(first) or (prepares and (Path(first["output_dir"]) / MARKER).is_file()):  # whatever it took
            check_output(first)
            return config, None
        if not prepares:
            share, each = first["train_batch_size"] // devices, first["per_device_train_batch_size"]
            if fits := [size for size in range(1, each + 1) if share and share % size == 0]:
                arguments.append(f"per_device_train_batch_size={fits[-1]}")
                first["per_device_train_batch_size"] = fits[-1]
        plan = make_plan(first, devices, sharding=sharding, list_missing=config["dry_run"])
    except Refused as error:
        raise Refused(f"warm-up {name}: {error}") from None
    for line in plan.missing:  # of a dry run: any other was refused for the first of them
        logger.warning("missing for warm-up %s: %s", name, line)
    return config, arguments
