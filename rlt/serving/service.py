"""A server without its HTTP: tables, requests, the worker, and what happens by itself.

By itself: sessions without a heartbeat end, what belonged to them is let go, old answers and checkpoints go, and after
some requests a model's whole state is kept, so that after a restart few have to be executed again.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, select, update

from rlt.errors import Refused
from rlt.serving.database import Database, models, sessions
from rlt.serving.errors import Busy, Unavailable
from rlt.serving.kinds import CHANGING, KINDS, addresses, dump
from rlt.serving.rates import Marks
from rlt.serving.requests import rows
from rlt.serving.requests.order import TRIES, Patience, Requests
from rlt.serving.requests.rows import Submission
from rlt.serving.sessions import checkpoints, curves, lives, tenants
from rlt.serving.storage import Storage
from rlt.wire.values import Limits
from rlt.workers.worker import Executor

MARK_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 30.0  # between tries to bring models back
FORGET_S = 24 * 3600.0  # after which a request of a session that is over is no longer known
CURVES_S = 30 * 24 * 3600.0  # after which curves of a model that is not used are no longer drawn

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class ModelPlace:
    """A base model that clients may name."""

    context: int  # tokens
    tokenizer: str | None = None  # a folder or hub name that clients load; None: the model's own name


@dataclass(frozen=True)
class Settings:
    database_url: str
    storage: Storage
    base_models: Mapping[str, ModelPlace]
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    session_s: float = 600.0  # without a heartbeat; clients send one every 10 s
    sweep_s: float = 30.0
    samples_waiting: int = 256  # above, clients are told to come again, as they are
    waiting_bytes: int = 4 * 2**30  # above this in one tenant's waiting requests,
    bodies_bytes: int = 512 * 2**20  # and above this in bodies that are being read
    sessions_of_a_tenant: int = 1000
    keep_every: int = 200  # requests, or
    keep_bytes: int = 256 * 2**20  # of requests, until a model's state is kept
    client_flags: Mapping[str, Any] = field(default_factory=dict)  # of `client/config`


class Service:
    def __init__(self, settings: Settings, executor: Executor) -> None:
        self.settings, self.executor, self.storage = settings, executor, settings.storage
        self.database = Database(settings.database_url)
        self.requests = Requests(self.database, executor, KINDS, settings.patience)
        self.requests.after, self.requests.revive = self._executed, self._revive
        self._reviving = asyncio.Lock()
        self._writing: set[str] = set()  # addresses of states that are being kept
        self.polls = 0  # that are held
        self.rates = Marks()
        self.secret = b""  # of links to files and of signed-in browsers
        self._known_keys: dict[str, str] = {}
        self._own: list[asyncio.Task] = []

    async def start(self, keys: Mapping[str, str]) -> None:
        """Keys by tenant. Models come back first, then what was promised is gone on with."""
        for tenant, key in keys.items():
            await self.database.run(tenants.add_tenant, tenant, key)
        self.secret = bytes.fromhex(await self.database.run(tenants.secret, secrets.token_hex()))
        await self.database.run(lives.greet_all, time.time())
        await asyncio.to_thread(self.storage.check)
        await self._tidy()
        await self._restore_all()
        await self.requests.resume()
        self._own = [asyncio.create_task(work) for work in (self._sweep(), self._mark())]

    async def close(self) -> None:
        for task in self._own:
            task.cancel()
        await self.requests.close()
        await asyncio.to_thread(self.executor.close)
        self.database.close()

    def check_base_model(self, name: str) -> None:
        if name not in self.settings.base_models:
            raise Refused(f"the base model {name!r} is not served: {', '.join(self.settings.base_models)} are")

    async def tenant_of(self, key: str | None) -> str:
        if key not in self._known_keys:
            self._known_keys[key or ""] = await self.database.run(tenants.tenant_of, key)
        return self._known_keys[key or ""]

    async def submit(self, submission: Submission) -> str:
        """Accepted at once; full queues of samples are refused, of training never.

        Raises:
            Busy: too many samples wait.
        """
        if submission.kind == "sample" and self.requests.waiting_samples() >= self.settings.samples_waiting:
            raise Busy(f"{self.settings.samples_waiting} samples wait already")
        most, waits = self.settings.waiting_bytes, self.requests.waiting_bytes(submission.tenant)
        if submission.payload and waits and waits + len(submission.payload) > most:
            raise Busy(f"{waits} bytes of requests wait already: {most} at most")
        return await self.requests.submit(submission)

    async def _failure(self, kind: str, model_id: str, payload: bytes) -> BaseException | None:
        """Why the worker could not do it, if it could not."""
        future = asyncio.wrap_future(self.executor.submit(kind, model_id, payload))
        await asyncio.wait([future])
        return future.exception()

    async def _executed(self, row: Row) -> None:
        """After a request of a model: its state is kept where much would have to be executed again."""
        loaded = row.kind == "load_weights" or bool(row.kind == "create_model" and row.details.get("path"))
        if row.kind == "unload_model":
            await self.database.surely(rows.drop_payloads, row.lane)
        if not loaded and row.kind != "optim_step":  # gradients that are not applied yet are no part of the state
            return
        if loaded or await self.database.surely(_much_to_repeat, row, self.settings):
            await self.keep_state(row.lane, row.seq_id)

    async def keep_state(self, model_id: str, seq_id: int) -> None:
        address = self.storage.new_address()
        self._writing.add(address)
        await self.requests.whole.wait()
        self.requests.answering.add(address)  # what is brought back rests on whether it is kept
        error = await self._failure("save_weights", model_id, dump({"address": address}))
        if error:  # training goes on: more is executed again after a restart
            logger.warning("the state of %s could not be kept: %s", model_id, error)
        else:
            await self.database.surely(_kept, model_id, seq_id, address)
        self.requests.answering.discard(address)
        self._writing.discard(address)

    async def _revive(self, life: int) -> None:
        """Once for each loss, whoever notices it first; all others wait."""
        async with self._reviving:
            if self.requests.lives != life:
                return
            self.requests.whole.clear()
            logger.warning("the worker is lost: another takes its place, and models are brought back")
            await self.requests.settled()
            self.executor.revive()
            await self._restore_all()
            self.requests.lives += 1
            self.requests.whole.set()

    async def _restore_all(self) -> None:
        """All begin again where the worker is lost once more, or its files cannot be read for a while.

        A request with which it is lost each time has its model given up; a worker that does not even start, or a place
        that does not answer, is no model's fault, and is tried again until it does.
        """
        losses, wait = Counter[tuple[str, int]](), FIRST_WAIT_S
        while await self.database.surely(_living_models):
            error = await self._failure("start", "", b"{}")
            if error is None:
                loss = await self._restore_each()
                if loss is None:
                    return
                model_id, number, error = loss
                losses[model_id, number] += isinstance(error, BrokenExecutor)
                if losses[model_id, number] == TRIES:
                    await self._lose(model_id, error)
            logger.warning("models could not be brought back, which is tried again: %s", error)
            if isinstance(error, BrokenExecutor):
                self.executor.revive()
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    async def _restore_each(self) -> tuple[str, int, BaseException] | None:
        """The model and number with which the worker or the place of tensors was lost, and the error."""
        for model in await self.database.surely(_living_models):
            failed = await self._restore(model)
            if failed and isinstance(failed[1], BrokenExecutor | OSError):
                return model.id, *failed
            if failed:
                await self._lose(model.id, failed[1])
        return None

    async def _restore(self, model: Row) -> tuple[int, BaseException] | None:
        """Bring a model back to where its last answered request left it; the number at which that failed, and why."""
        after = -1
        if model.kept_address:
            form = {"base_model": model.base_model, "adapter": model.adapter, "optimizer": True}
            error = await self._failure("create_model", model.id, dump(form | {"address": model.kept_address}))
            after = model.kept_seq
            if error:
                return after, error
        for row in await self.database.surely(rows.journal, model.id, after, CHANGING):
            error = await self._failure(row.kind, model.id, row.payload)
            as_before = row.category is not None and isinstance(error, Refused)
            if error and not as_before:
                return row.seq_id, error
        return None

    async def _lose(self, model_id: str, error: BaseException) -> None:
        logger.warning("the model %s could not be brought back: %s", model_id, error)
        await self.database.surely(_give_up, model_id)

    async def _tidy(self) -> None:
        """Remove what nothing refers to, such as what a killed process left half written.

        A folder is referred to before it is written: so folders are listed before what is referred to.
        """
        found = await asyncio.to_thread(self.storage.folders)
        kept = await self.database.run(addresses) | self._writing
        for address in found - kept:
            await asyncio.to_thread(self.storage.remove, address)

    async def _mark(self) -> None:
        while True:
            self.rates.mark(time.monotonic(), self.requests.tokens, self.requests.busy_s)
            await asyncio.sleep(MARK_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            try:
                await self.sweep()
            except (Unavailable, OSError) as error:
                logger.warning("what is no longer needed could not be removed: %s", error)

    async def sweep(self) -> None:
        now = time.time()
        await self.database.run(lives.end_silent, now - self.settings.session_s)
        await self.database.run(rows.expire, now - self.settings.patience.keep_s)
        await self.database.run(rows.forget, now - FORGET_S)
        await self.database.run(curves.forget, now - CURVES_S)
        await self.database.run(checkpoints.forget_expired)
        async with self._reviving:  # not while models are brought back from what would be removed
            await self._let_all_go()
            await self._tidy()

    async def _let_all_go(self) -> None:
        for model_id in await self.database.run(lives.left_behind):
            await self._let_go("unload_model", model_id, {})
            await self.database.run(rows.drop_payloads, model_id)
            self.requests.lanes.pop(model_id, None)
        for sampler in await self.database.run(lives.abandoned_samplers):
            await self._let_go("unload_sampler", sampler.id, {"address": sampler.address})

    async def _let_go(self, kind: str, name: str, form: Mapping[str, Any]) -> None:
        if error := await self._failure(kind, name, dump(form)):
            logger.warning("%s was not let go: %s", name, error)


def _living_models(connection: Connection) -> list[Row]:
    alive = select(sessions.c.id).where(sessions.c.ended.is_(None))
    theirs = models.c.session_id.in_(alive) & models.c.ready & models.c.unloaded.is_(False)
    return list(connection.execute(select(models).where(theirs).order_by(models.c.created)))


def _much_to_repeat(connection: Connection, row: Row, settings: Settings) -> bool:
    kept = connection.execute(select(models.c.kept_seq).where(models.c.id == row.lane)).scalar_one()
    count, size = rows.journal_size(connection, row.lane, -1 if kept is None else kept)
    return count >= settings.keep_every or size >= settings.keep_bytes


def _kept(connection: Connection, model_id: str, seq_id: int, address: str) -> None:
    this = models.c.id == model_id
    connection.execute(update(models).where(this).values(kept_seq=seq_id, kept_address=address))
    rows.drop_payloads(connection, model_id, up_to=seq_id)


def _give_up(connection: Connection, model_id: str) -> None:
    """Its requests fail, each at its turn."""
    connection.execute(update(models).where(models.c.id == model_id).values(unloaded=True))
