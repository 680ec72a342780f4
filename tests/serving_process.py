"""A server's requests without HTTP in a process of their own: `serving_process.py FOLDER submit|resume`.

`submit` promises three numbers' worth of work and waits to be killed in its middle; `resume` answers it.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
from serving_unigram import Unigram

from rlt.serving.kinds import dump
from rlt.serving.requests.rows import Submission
from rlt.serving.service import ModelPlace, Service, Settings
from rlt.serving.sessions import lives
from rlt.serving.storage import Storage
from rlt.wire import protobuf
from rlt.wire.values import Datum, ForwardBackwardRequest, tensor_of
from rlt.workers.worker import ThreadExecutor

ADAPTER = {"rank": 8, "seed": None, "train_mlp": True, "train_attn": True, "train_unembed": True}
KEYS = {"a": "tml-aaaaaaaaaaaa", "b": "tml-bbbbbbbbbbbb"}


def settings(folder: Path, **changes) -> Settings:
    changes = {"base_models": {"unigram": ModelPlace(context=64)}} | changes
    database = changes.pop("database", f"sqlite:///{folder}/state.db")
    return Settings(database, Storage(changes.pop("tensors", str(folder / "tensors"))), **changes)


def service_in(folder: Path, worker: Unigram, **changes) -> Service:
    return Service(settings(folder, **changes), ThreadExecutor(worker))


def batch(model_id: str, seq_id: int, targets: list[int], loss: str = "cross_entropy", forward_only=False) -> bytes:
    datum = Datum(np.ones(len(targets), int), {"target_tokens": tensor_of(targets)})
    return protobuf.write_request(ForwardBackwardRequest(model_id, seq_id, [datum], loss, {}, forward_only))


def submission(model_id: str, seq_id: int, kind: str, payload: bytes | None, tenant: str = "a", **more) -> Submission:
    return Submission(tenant, model_id.partition(":")[0], kind, model_id, seq_id, payload, **more)


async def new_model(service: Service, tenant: str = "a") -> str:
    session_id = await service.database.run(lives.open_session, tenant, {}, time.time())
    model_id = lives.model_id_of(session_id, 0)
    row = {"id": model_id, "tenant": tenant, "session_id": session_id, "base_model": "unigram", "adapter": ADAPTER}
    await service.database.run(lives.add_model, row, time.time())
    form = {"base_model": "unigram", "adapter": ADAPTER}
    request_id = await service.submit(
        submission(model_id, 0, "create_model", dump(form), tenant, details={"type": "create_model"})
    )
    assert await service.requests.poll(request_id, tenant)
    return model_id


def step(model_id: str, seq_id: int, rate: float = 0.1) -> Submission:
    return submission(model_id, seq_id, "optim_step", dump({"adam_params": {"learning_rate": rate}}))


def work(model_id: str, seq_id: int) -> Submission:
    """Odd numbers read data, even ones are steps."""
    if seq_id % 2 == 0:
        return step(model_id, seq_id)
    return submission(model_id, seq_id, "forward_backward", batch(model_id, seq_id, [seq_id % 7, 3]))


async def main(folder: Path, act: str) -> None:
    service = service_in(folder, Unigram(seconds=0.05), keep_every=6)
    await service.start(KEYS)
    promise = folder / "promise.json"
    if act == "submit":
        model_id = await new_model(service)
        promised = [await service.submit(work(model_id, number)) for number in range(1, 21)]
        promise.write_text(json.dumps([model_id, promised]))
        await asyncio.sleep(60)
    model_id, promised = json.loads(promise.read_text())
    answers = [await service.requests.poll(request_id, "a") for request_id in promised]
    logits = service.executor.worker.models[model_id].logits
    said = [row.state if row else None for row in answers]
    sys.stdout.write(json.dumps({"states": said, "logits": logits.tolist()}))
    await service.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
