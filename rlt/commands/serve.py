"""A server that clients train and sample through, on this machine's own address.

    python serve.py [port=8000] [host=127.0.0.1] [base_models=[embedded/smollm2-135m-instruct]]
        [state_dir=results/serving] [database=postgresql://...] [tensors=s3://bucket/folder] [sampler=vllm]
        [full_finetuning=false] [body_mib=32] ...

Clients name a base model as `base_models` does: embedded/..., or a folder with weights and tokenizer; `name=folder`
gives it a name that clients know. One process trains, another one samples; each loads a model with the first request
for it. `sampler=torch` samples by the trainer's own forward pass, as what vLLM does not run is in any case. With
`full_finetuning=true` a client may train all weights (a rank of null), in a copy of the base.

Clients send a key: that of RLT_API_KEY, or one that is made and printed. `RLT_API_KEY=ann=tml-...,bob=tml-...` gives
two tenants their own. What the server promised is kept in `state_dir`: started again, it goes on.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt.commands.logs import set_up_logging
from rlt.errors import Refused, fail
from rlt.models.paths import resolve_model_path
from rlt.places import API_KEY_VARIABLE
from rlt.planning.versions import need_group
from rlt.runs.folder import folder_lock

if TYPE_CHECKING:
    from rlt.serving.service import ModelPlace, Service
    from rlt.workers.worker import Worker

LIMITS = {
    "body_mib": 32,  # of one request
    "datums": 1100,  # of one request; clients cut at 1024
    "tokens": 131072,  # of one datum or prompt
    "sessions": 1000,  # of one tenant that are open
    "session_s": 600,  # without a heartbeat until a session is over; clients send one every 10 s
    "samples_waiting": 256,  # above, clients are told to come again
    "keep_every": 200,  # requests of a model until its state is kept: what a restart executes again at most
    "sweep_s": 30,  # until what nobody needs is removed
}
USAGE = {
    "host": "127.0.0.1",
    "port": 8000,  # 0: whichever is free
    "state_dir": "results/serving",
    "database": None,  # a URL, such as postgresql://USER:PASSWORD@HOST/NAME; null: SQLite in state_dir
    "tensors": None,  # an address that fsspec opens, such as s3://bucket/folder; null: in state_dir
    "base_models": ["embedded/smollm2-135m-instruct"],  # that clients may name
    "sampler": "vllm",  # or torch
    "full_finetuning": False,  # whether clients may train all weights
    **LIMITS,
}
SAMPLERS = ("vllm", "torch")
ENGINE_VARIABLES = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # read when it is imported
TENANT = "owner"
STOP_S = 5  # for answers that are on their way


def read_settings(words: list[str]) -> dict[str, Any]:
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    except OmegaConfBaseException as error:
        raise Refused(f"{' '.join(words)} is no list of key=value: {error}") from error
    assert isinstance(given, dict)
    if unknown := sorted(str(key) for key in given.keys() - USAGE.keys()):
        raise Refused(f"{', '.join(unknown)}: the keys are {', '.join(USAGE)}")
    settings: dict[str, Any] = {**USAGE, **{str(key): value for key, value in given.items()}}
    port = settings["port"]
    if not isinstance(port, int) or not 0 <= port < 2**16:
        raise Refused(f"port is {port!r}: give 1 to 65535, or 0 for a free one")
    if settings["sampler"] not in SAMPLERS:
        raise Refused(f"sampler is {settings['sampler']!r}: {' or '.join(SAMPLERS)} would do")
    if not isinstance(settings["full_finetuning"], bool):
        raise Refused(f"full_finetuning is {settings['full_finetuning']!r}: give true or false")
    for key in LIMITS:
        if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < 1:
            raise Refused(f"{key} is {settings[key]!r}: give a whole number from 1 on")
    return settings


def read_keys() -> tuple[dict[str, str], bool]:
    """Keys by tenant, and whether one was made."""
    given = os.environ.get(API_KEY_VARIABLE)
    if not given:
        return {TENANT: f"tml-{secrets.token_urlsafe(24)}"}, True
    if "," not in given and not given.partition("=")[2]:
        return {TENANT: given}, False
    pairs = dict(each.split("=", 1) for each in given.split(",") if "=" in each)
    if len(pairs) != given.count(",") + 1:
        raise Refused(f"{API_KEY_VARIABLE} holds no key, and no list of tenant=key with commas between")
    return pairs, False


def make_worker(folders: Mapping[str, str], sampler: str, full_finetuning: bool) -> "Worker":
    """In a process of the worker's own: the server's does without torch."""
    for name, value in ENGINE_VARIABLES.items():
        os.environ.setdefault(name, value)
    set_up_logging()
    from rlt.workers.torch_worker import TorchWorker

    return TorchWorker(folders, sampler, full_finetuning)


def find_models(names: Any) -> dict[str, Path]:
    """Folders of weights and tokenizers by the names that clients give.

    Raises:
        Refused: one is neither an embedded model nor a folder with a model's settings.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise Refused(f"base_models is {names}: give a list of models, such as {USAGE['base_models']}")
    places = {name: place or name for name, _, place in (each.partition("=") for each in names)}
    folders = {name: Path(resolve_model_path(place)).absolute() for name, place in places.items()}
    for name, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise Refused(f"base_models holds {name!r}: give embedded/..., the folder of a model, or name=folder")
    return folders


def place_of(folder: Path) -> "ModelPlace":
    """Clients load the tokenizer from the folder. They cut a name with two slashes, as if it were a hub's."""
    from rlt.serving.service import ModelPlace

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = (config.get("text_config") or config).get("max_position_embeddings")
    if not isinstance(context, int):
        raise Refused(f"{folder}/config.json does not say how much the model reads (max_position_embeddings)")
    return ModelPlace(context, str(folder) if str(folder).count("/") != 2 else f"/.{folder}")


def build_service(settings: dict[str, Any], folder: Path) -> "Service":
    from rlt.serving.service import Service, Settings
    from rlt.serving.storage import Storage
    from rlt.wire.values import Limits
    from rlt.workers.processes import ProcessExecutor

    models = find_models(settings["base_models"])
    database = settings["database"] or f"sqlite:///{folder / 'state.db'}"
    storage = Storage(settings["tensors"] or str(folder / "tensors"))
    places = {name: place_of(each) for name, each in models.items()}
    folders = {name: str(each) for name, each in models.items()}
    work = partial(make_worker, folders, settings["sampler"], settings["full_finetuning"])
    limits = Limits(settings["body_mib"] * 2**20, settings["datums"], settings["tokens"])
    named = {key: settings[key] for key in ("session_s", "samples_waiting", "keep_every", "sweep_s")}
    named |= {"limits": limits, "sessions_of_a_tenant": settings["sessions"]}
    return Service(Settings(database, storage, places, **named), ProcessExecutor(work, folder / "scratch"))


async def serve(settings: dict[str, Any], keys: dict[str, str], made: bool) -> None:
    folder = Path(settings["state_dir"]).expanduser().absolute()
    with folder_lock(folder, "state_dir"):
        service = build_service(settings, folder)
        await serve_until_asked(service, settings, keys, made)


async def serve_until_asked(service: "Service", settings: dict[str, Any], keys: dict[str, str], made: bool) -> None:
    import uvicorn

    from rlt.serving.api.app import create_app
    from rlt.serving.api.server import Server
    from rlt.serving.errors import Unavailable

    config = uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=STOP_S)
    server = Server(config)
    try:
        listener = socket.create_server((settings["host"], settings["port"]))
        with server.ended_by_signals():
            try:
                await service.start(keys)
            except Unavailable as error:
                raise Refused(str(error)) from error
            host, port = listener.getsockname()[:2]  # it takes connections from here on
            key = f", key {keys[TENANT]}" if made else ""
            sys.stdout.write(f"serving http://{host}:{port}{key}\n")
            sys.stdout.flush()
            await server.serve(sockets=[listener])
    finally:
        await service.close()


def main() -> None:
    try:
        settings, (keys, made) = read_settings(sys.argv[1:]), read_keys()
        for module in ("sqlalchemy", "fastapi", "uvicorn", "prometheus_client"):
            need_group("api", module)
        asyncio.run(serve(settings, keys, made))
    except (Refused, OSError) as error:  # OSError: an address that is taken, a place that cannot be written to
        fail(error)
    except KeyboardInterrupt:  # a second one, while the service is being closed
        sys.exit(128 + signal.SIGINT)
