"""A vLLM server for one run: `python -m rlt.generation.served.vllm_server PLAN URL LAUNCHER [FD]`.

The launcher starts it, with the socket that it listens at (FD) where that is no file. It becomes vLLM's own server,
with what the run's configuration says of model, lengths and precision.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from rlt.generation.cpu import settings as cpu_settings
from rlt.launching.connection import LONGEST_SOCKET, UNIX
from rlt.launching.environment import LOOPBACK_INTERFACE
from rlt.launching.lifetime import end_with
from rlt.models.devices import device_type, uses_bfloat16
from rlt.models.paths import resolve_model_path
from rlt.places import TRANSFER_VARIABLE
from rlt.schema import FILES, IPC

ALONE = 0.9  # of a device's memory, where a server has it to itself
BACKENDS = {FILES: "chunks"}  # of vLLM, where it has another name


def transfer_of(config: dict[str, Any]) -> str:
    """How the run sends weights; one that does not train has no such key, and sends files."""
    return config.get("weight_transfer", FILES)


def server_arguments(config: dict[str, Any], model: str, on_cpu: bool, dtype: str) -> list[str]:
    """The arguments of vLLM's server, but for where it listens."""
    way = transfer_of(config)
    arguments = {
        "model": model,
        "served-model-name": "policy",
        "max-model-len": config["max_prompt_length"] + config["max_completion_length"],
        "dtype": dtype,
        "tensor-parallel-size": config.get("vllm_tensor_parallel_size", 1),
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": json.dumps({"backend": BACKENDS.get(way, way)}),
        "load-format": "dummy",  # the trainer's weights arrive before the first request
        "middleware": "rlt.generation.served.guard.KeyGuard",
        "uvicorn-log-level": "warning",
    }
    flags = ["--trust-remote-code"] if config["trust_remote_code"] else []
    if on_cpu:
        for name, value in cpu_settings.OPTIONS.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{option}" if value else f"--no-{option}")
            else:
                arguments[option] = json.dumps(value)
    else:
        arguments["gpu-memory-utilization"] = config["vllm_gpu_memory_utilization"] if way == IPC else ALONE
    return [*(word for key, value in arguments.items() for word in (f"--{key}", str(value))), *flags]


def socket_folder(own: Path) -> str:
    """Where vLLM's processes meet: in the launcher's folder, with which it goes, unless its name is too long for a
    socket's (a scheduler's TMPDIR may be)."""
    return str(own) if len(os.fsencode(own)) <= LONGEST_SOCKET - len(f"/{uuid4()}") else "/tmp"


def listens_at(url: str) -> list[str]:
    """The arguments of vLLM's server that say where it listens; a socket file that another life left is removed."""
    if url.startswith(UNIX):
        file = url.removeprefix(UNIX)
        Path(file).unlink(missing_ok=True)
        return ["--uds", file]
    place = urlsplit(url)
    return ["--port", str(place.port), "--host", str(place.hostname)]


def program_at(url: str, held: list[str]) -> list[str]:
    """What Python runs as the server.

    Args:
        held: the descriptor of its listening socket, where its launcher holds one.
    """
    if url.startswith(UNIX):
        return ["-m", "vllm.entrypoints.openai.api_server"]
    return ["-m", "rlt.generation.served.at_socket", *held]


def transfer_environment(way: str, url: str) -> dict[str, str]:
    """What a server has to know of how it takes weights, and where NCCL listens."""
    environment = {TRANSFER_VARIABLE: way}
    if way == IPC:  # handles of memory come pickled, from who has the key
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if url.startswith(UNIX) or str(urlsplit(url).hostname).startswith("127."):
        environment["NCCL_SOCKET_IFNAME"] = LOOPBACK_INTERFACE  # as the ranks'
    return environment


def main() -> None:
    end_with(int(sys.argv[3]))
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["config"]
    on_cpu = device_type() == "cpu"
    dtype = "auto" if not on_cpu else "bfloat16" if uses_bfloat16(config["bf16"]) else "float32"
    arguments = server_arguments(config, resolve_model_path(config["model_name_or_path"]), on_cpu, dtype)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the paths that take weights
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # whatever an engine inside the process that started it has set
    os.environ |= transfer_environment(transfer_of(config), sys.argv[2])
    os.environ.pop("VLLM_API_KEY", None)  # a user's, for servers of other runs: vLLM would refuse what has our key
    if on_cpu:
        for name, value in cpu_settings.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder(Path(sys.argv[1]).parent))
    command = [*program_at(sys.argv[2], sys.argv[4:]), *arguments, *listens_at(sys.argv[2])]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
