"""How a trainer's weights reach the servers that generate for it: chosen by where both are."""

from typing import Any
from urllib.parse import urlsplit

from rlt.errors import Refused
from rlt.schema import AUTO, FILES, IPC, NCCL, server_urls

WAYS = (AUTO, FILES, NCCL, IPC)
KEY = "weight_transfer"


def with_weight_transfer(config: dict[str, Any], gpus: int, devices: int, server_devices: int) -> dict[str, Any]:
    """A run's configuration with the way of its weights; without servers, as it was.

    Args:
        gpus: that this machine shows.
        devices: that train.
        server_devices: that the launcher gives to servers of its own.

    Raises:
        Refused: the way that was asked for cannot work here.
    """
    way = config.get(KEY, AUTO)
    if way not in WAYS:
        raise Refused(f"{KEY}={way}: use one of {', '.join(WAYS)}")
    if not config.get("use_vllm_server"):
        if way != AUTO:
            raise Refused(f"{KEY}={way} without servers: leave it out, or start them (./launch_with_server.sh)")
        return config
    if KEY not in config:  # of a run that does not train
        return config
    if way == AUTO:
        way = chosen(config, gpus, devices, server_devices)
    check_way(way, config, has_gpus(config, gpus), devices, server_devices)
    return {**config, KEY: way}


def chosen(config: dict[str, Any], gpus: int, devices: int, server_devices: int) -> str:
    if not has_gpus(config, gpus):
        return FILES
    shared = 0 < server_devices <= devices <= gpus < devices + server_devices
    return IPC if shared else NCCL


def has_gpus(config: dict[str, Any], gpus: int) -> bool:
    """Whether a run computes on GPUs; this machine may only plan it."""
    return bool(gpus) or config["requires"] == "gpu"


def check_way(way: str, config: dict[str, Any], on_gpus: bool, devices: int, server_devices: int) -> None:
    if way in (NCCL, IPC) and not on_gpus:
        raise Refused(f"{KEY}={way} needs GPUs, and none is visible: set {KEY}={FILES}")
    if way != IPC:
        return
    if server_devices > devices > 0:
        raise Refused(
            f"{KEY}={IPC} with {server_devices} devices of servers and {devices} that train: a server's GPU has to be "
            f"a rank's; start at most {devices}, or set {KEY}={NCCL}"
        )
    for url in server_urls(config["vllm_server_base_url"]):
        host = str(urlsplit(url).hostname)
        if not (host.startswith("127.") or host == "localhost"):
            raise Refused(
                f"{KEY}={IPC} with vllm_server_base_url={url}: memory is handed over within one machine; set "
                f"{KEY}={NCCL}"
            )


def devices_of_both(config: dict[str, Any], gpus: int, devices: int, server_devices: int) -> int:
    """How many devices a run and its servers take."""
    way = config.get(KEY, FILES)
    way = chosen(config, gpus, devices, server_devices) if way == AUTO else way
    return max(devices, server_devices) if way == IPC else devices + server_devices
