"""What this machine has: GPUs, servers, models, data, the hub, room on its disk."""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlt.data.benchmarks import BENCHMARKS
from rlt.data.benchmarks import PREFIX as BENCHMARK
from rlt.data.generator import GENERATOR
from rlt.data.sources import inspect_source, load_rows
from rlt.data.splits import check_disjoint
from rlt.errors import Refused
from rlt.models.embedded import GGUF_FILES, is_embedded
from rlt.models.files import check_files
from rlt.models.paths import MERGED, adapter_base, is_adapter
from rlt.places import KEY_VARIABLE, LOCAL_STARTS, looked_in
from rlt.planning.memory import GIB, parameters
from rlt.prompts.styles import load_format
from rlt.runs.folder import MARKER, PACKED, is_complete
from rlt.schema import profile_of, server_urls

logger = logging.getLogger("rlt")

NVIDIA_SMI_TIMEOUT_S = 5
NETWORK_TIMEOUT_S = 3.0
PORTS = {"https": 443, "http": 80}


def gpu_memory_gib() -> float | None:
    """Memory of the smallest NVIDIA GPU that this process may use; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]
    if chosen == []:
        return None
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    query += ["-i", ",".join(chosen)] if chosen else []
    sizes = [float(line) for line in ask_nvidia_smi(*query) if line.replace(".", "").isdigit()]
    return min(sizes) / 1024 if sizes else None


def ask_nvidia_smi(*arguments: str) -> list[str]:
    """The lines of its answer; none, and a warning, where it takes too long; none where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", *arguments]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        logger.warning("nvidia-smi did not answer within %s s: no GPU is seen", NVIDIA_SMI_TIMEOUT_S)
        return []
    return [line.strip() for line in answer.stdout.splitlines()]


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() not in ("", "-1")]) if shutil.which("nvidia-smi") else 0
    if not shutil.which("nvidia-smi"):
        return 0
    return sum(line.startswith("GPU ") for line in ask_nvidia_smi("-L"))


def check_device(config: dict[str, Any], gpus: int) -> None:
    if config["requires"] == "gpu" and not gpus:
        raise Refused(f"run {config['run_name']} needs a GPU and none is visible (requires=null tries the CPU)")
    if config.get("fp16") and not gpus:
        raise Refused("fp16=true needs a GPU: a CPU computes in bfloat16 (bf16=true) or float32")


def check_servers_answer(config: dict[str, Any]) -> None:
    """Servers that are said to be there already; those that the launcher starts have no port yet."""
    for url in server_urls(config.get("vllm_server_base_url")) if config.get("use_vllm_server") else []:
        address = urlsplit(url)
        if address.hostname is None or address.port is None:
            raise Refused(f"vllm_server_base_url={url} is no address such as http://host:8000")
        if address.port and not _answers(address.hostname, address.port):
            raise Refused(f"vllm_server_base_url={url} does not answer")
        if address.port and not os.environ.get(KEY_VARIABLE):
            raise Refused(f"vllm_server_base_url={url}: set {KEY_VARIABLE} to the servers' key")


def check_data(config: dict[str, Any]) -> None:
    sources = [config.get(key) for key in ("dataset_id_or_path", "eval_dataset_id_or_path")]
    for key, source in zip(("dataset_id_or_path", "eval_dataset_id_or_path"), sources, strict=True):
        if source is None or has_packed_rows(source):
            continue
        if profile_of(config).learns_from == "text":
            raise Refused(f"{key}={source} holds no packed rows: prepare it with the stages tokens and pack")
        try:
            inspect_source(source)
        except Refused as error:
            raise Refused(f"{key}={source}: {error}") from None
        if source.startswith(BENCHMARK):
            _check_hub(key, BENCHMARKS[source.removeprefix(BENCHMARK)].hub_name, "datasets")
        elif not source.startswith(GENERATOR) and not Path(source).expanduser().exists():
            _check_hub(key, source, "datasets")
    if sources[1] and sources[0] == sources[1]:
        raise Refused(
            f"eval_dataset_id_or_path={sources[1]}: the evaluation rows are among the training rows; name another "
            "source, or set eval_size to hold some out"
        )
    files = [source for source in sources if source and Path(source).expanduser().is_file()]
    if not files or not profile_of(config).holds_out:
        return
    style, held_out = load_format(config["reasoning_format"]), config["eval_size"]
    tags = (style.thought_tags, style.solution_tags)
    if len(files) == 2:
        check_disjoint(*(load_rows(source, tags=tags).rows for source in files))
    elif sources[1] is None and held_out:
        found = len(load_rows(files[0], size=held_out + 1, tags=tags).rows)
        if found <= held_out:
            raise Refused(f"eval_size={held_out} leaves nothing of {found} rows to train on")


def has_packed_rows(source: str) -> bool:
    """Whether it is the output folder of a preparation that packs.

    Raises:
        Refused: its preparation has not ended.
    """
    folder = Path(source).expanduser()
    found = any((folder / PACKED).glob("train-*.parquet"))
    if found and not (folder / MARKER).is_file():
        raise Refused(f"{source} is of a preparation that has not ended ({MARKER} is missing): run it to its end")
    return found


def check_models_exist(named: dict[str, str]) -> None:
    """Each model must be embedded, a local folder, in the hub's cache, or a hub name while the hub answers."""
    for key, name in named.items():
        if is_embedded(name):
            if name not in GGUF_FILES:
                raise Refused(f"{key}={name} is not embedded: use one of {', '.join(GGUF_FILES)}")
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            check_files(path)
            if is_adapter(path) and not (path / MERGED).is_dir():
                check_models_exist({f"{key}={name}, base": _base_of(key, path)})
            elif not is_adapter(path) and not (path / "config.json").is_file():
                raise Refused(f"{key}={name}: the folder holds no model (no config.json)")
            continue
        if name.startswith(LOCAL_STARTS) or name.count("/") != 1:
            raise Refused(f"{key}={name}: model path does not exist{looked_in(name)}")
        _check_hub(key, name, "models")


def _base_of(key: str, adapter: Path) -> str:
    try:
        return adapter_base(adapter)
    except Refused as error:
        raise Refused(f"{key}={adapter}: {error}") from None


def _check_hub(key: str, name: str, kind: str) -> None:
    """A hub name must be in the local cache, or the hub must answer."""
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}").is_dir():
        return
    address = urlsplit(constants.ENDPOINT)
    reason = "is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        if address.scheme in getproxies() or _answers(address.hostname or "", address.port or PORTS[address.scheme]):
            return
        reason = "is no local path, is not in the local cache, and the hub does not answer"
    raise Refused(f"{key}={name} {reason}")


def _answers(host: str, port: int) -> bool:
    """Whether a connection opens in time; in a thread, because looking up a name has no time limit of its own."""
    opened = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=NETWORK_TIMEOUT_S):
            opened.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT_S)
    return bool(opened)


def check_disk(config: dict[str, Any]) -> None:
    if not profile_of(config).trains or is_complete(config):
        return
    folder = Path(config["output_dir"]).absolute()
    while not folder.exists():
        folder = folder.parent
    trained = parameters(config) * (0.02 if config["use_peft"] else 1)
    per_checkpoint = trained * 16 + (parameters(config) * 4 if config.get("sync_ref_model") else 0)
    needed = per_checkpoint * ((config["save_total_limit"] or 5) + 1) + parameters(config) * 4
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(
            f"output_dir={config['output_dir']}: checkpoints need about {needed / GIB:.0f} GiB and "
            f"{free / GIB:.0f} GiB are free: lower save_total_limit or choose another disk"
        )


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
