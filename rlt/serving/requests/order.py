"""Executes requests: a model's strictly by their numbers, a sampler's as they come; each once, whatever is sent twice.

A submit returns at once; a poll is held until its answer is there or the holding time is over. After a restart
`resume` brings models back to where they were (their kept state, then the requests since) and goes on with what waits.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from rlt.errors import Refused
from rlt.serving.database import Database
from rlt.serving.errors import Gone, Missing
from rlt.serving.requests import rows
from rlt.serving.requests.rows import SERVER, USER, Submission
from rlt.workers.worker import Executor

SETTLE_S = 0.01
TRIES = 3  # of something with which the worker is lost


@dataclass(frozen=True)
class Kind:
    """What is done before and after a request is executed, in the transaction that reads or answers it."""

    protobuf: bool = False  # the form of its result
    ordered: bool = True  # by the numbers of its model
    changes_model: bool = False  # must be executed again where the model's state was lost
    changes_by_failing: bool = False  # and so must those that the worker refused
    tokens: Callable[[Row, bytes], int] = lambda row, result: 0  # that were read or made
    prepare: Callable[[Connection, Row], bytes | None] = lambda connection, row: row.payload  # None: without a worker
    complete: Callable[[Connection, Row, bytes], bytes] = lambda connection, row, result: result


@dataclass(frozen=True)
class Patience:
    """Time limits, in seconds, and counts."""

    hold_s: float = 30.0  # a poll; clients give up at 45
    gap_s: float = 60.0  # for a number that later ones wait for; clients repeat a submit for longer
    keep_s: float = 3600.0  # an answer
    ahead: int = 10_000  # numbers
    crowd: int = 32  # waiting requests of one model above which a client is told of the queue


@dataclass
class Lane:
    """The order of one model."""

    name: str
    next: int
    waiting: dict[int, str] = field(default_factory=dict)  # ids by number
    task: asyncio.Task | None = None
    gap: asyncio.TimerHandle | None = None


@dataclass
class Pending:
    tenant: str
    lane: str
    kind: str
    size: int = 0  # bytes
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: bool = False  # by the client, before the worker was asked


class Requests:
    def __init__(self, database: Database, executor: Executor, kinds: Mapping[str, Kind], patience: Patience) -> None:
        self.database, self.executor, self.kinds, self.patience = database, executor, kinds, patience
        self.pending: dict[str, Pending] = {}
        self.lanes: dict[str, Lane] = {}
        self.counts: dict[tuple[str, str], int] = {}  # ended requests by kind and outcome
        self.tokens: dict[str, int] = {}  # read or made, by kind
        self.busy_s: dict[str, float] = {}  # in which the worker was at something, by kind
        self.answering: set[str] = set()  # requests that were executed, and whose answers are not kept yet
        self.lives = 0  # how often the worker was lost and replaced
        self.whole = asyncio.Event()  # cleared while models are brought back
        self.whole.set()
        self.revive: Callable[[int], Any] | None = None  # awaited when the worker of that life is lost
        self.after: Callable[[Row], Any] | None = None  # awaited when a request of a lane was executed
        self._futures: dict[str, asyncio.Future[bytes]] = {}  # of requests that are executed, or wait for the worker
        self._tasks: set[asyncio.Task] = set()
        self._sampled = asyncio.Event()  # set when a sample ends, and another one takes its place

    async def submit(self, submission: Submission) -> str:
        """The id to poll for; that of the first, where a client repeats itself."""
        ordered = self.kinds[submission.kind].ordered
        lane = await self._lane(submission.lane) if ordered else None
        if lane:
            rows.check_ahead(submission.seq_id, lane.next, self.patience.ahead)
        request_id, new = await self.database.run(rows.keep, submission, time.time())
        if new:
            sent = submission
            pending = Pending(sent.tenant, sent.lane, sent.kind, len(sent.payload or b""))
            self._take(request_id, pending, sent.seq_id, lane)
        return request_id

    def _take(self, request_id: str, pending: Pending, seq_id: int, lane: Lane | None) -> None:
        self.pending[request_id] = pending
        if lane is None:
            self._spawn(self._execute(request_id))
        elif seq_id < lane.next:
            self._spawn(self._fail(request_id, f"the request {seq_id} came after later ones had given it up", SERVER))
        else:
            lane.waiting[seq_id] = request_id
            self._advance(lane)

    async def _lane(self, name: str) -> Lane:
        if name not in self.lanes:
            expected = await self.database.run(rows.next_number, name)
            self.lanes.setdefault(name, Lane(name, expected))
        return self.lanes[name]

    def _spawn(self, work: Any) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _advance(self, lane: Lane) -> None:
        """Begin with what is next, or give the missing number its time."""
        if lane.task is not None:
            return
        if lane.next in lane.waiting:
            if lane.gap is not None:
                lane.gap.cancel()
                lane.gap = None
            lane.task = self._spawn(self._run(lane))
        elif lane.waiting and lane.gap is None:
            loop = asyncio.get_running_loop()
            lane.gap = loop.call_later(self.patience.gap_s, lambda: self._spawn(self._close_gap(lane)))

    async def _run(self, lane: Lane) -> None:
        try:
            while lane.next in lane.waiting:
                await self._execute(lane.waiting.pop(lane.next))
                lane.next += 1
        finally:
            lane.task = None
        self._advance(lane)

    async def _close_gap(self, lane: Lane) -> None:
        """Those that wait fail; the lane goes on after them."""
        lane.gap = None
        if lane.task is not None or not lane.waiting or lane.next in lane.waiting:
            return
        missing, given_up = lane.next, lane.waiting
        lane.waiting, lane.next = {}, max(given_up) + 1
        reason = f"the request {missing} of {lane.name} did not come within {self.patience.gap_s:g} s: submit again"
        await self._fail([given_up[number] for number in sorted(given_up)], reason, SERVER)

    async def _execute(self, request_id: str) -> None:
        row = await self.database.surely(rows.read, request_id)
        kind = self.kinds[row.kind]
        if row.error is not None:
            await self._fail(request_id, row.error, USER)
            return
        try:
            payload = await self.database.surely(_prepare, kind, row)
        except (Refused, Missing, Gone) as error:
            await self._fail(request_id, str(error), SERVER if isinstance(error, Gone) else USER)
            return
        if self.pending[request_id].given_up:
            await self._fail(request_id, "the client cancelled it", USER)
            return
        try:
            done = await self._answer(row, kind, payload)
        finally:
            self.answering.discard(request_id)
        if done and self.after:
            await self.after(row)

    async def _answer(self, row: Row, kind: Kind, payload: bytes | None) -> bool:
        """Execute a request and keep what came of it; whether it was done."""
        request_id, result = row.id, b"{}"
        if payload is not None:
            future = await self._work(row, payload)
            self.answering.add(request_id)
            if future.cancelled():
                await self._fail(request_id, "the client cancelled it", USER)
                return False
            if error := future.exception():
                refused = isinstance(error, Refused)
                again = refused and kind.changes_by_failing
                await self._fail(request_id, str(error) or repr(error), USER if refused else SERVER, again)
                return False
            result = future.result()
        try:
            tokens = await self.database.surely(_complete, kind, row, result)
        except Refused as error:
            await self._fail(request_id, str(error), USER)
            return False
        except SQLAlchemyError as error:  # such as an answer that is larger than the database keeps
            await self._fail(request_id, f"the answer cannot be kept: {error}", SERVER, kind.changes_model)
            return False
        self.tokens[row.kind] = self.tokens.get(row.kind, 0) + tokens
        self._end(request_id, rows.DONE)
        return True

    async def settled(self) -> None:
        """Until answers of a worker that is lost are kept: they are part of what is brought back."""
        while self.answering or any(future.done() for future in self._futures.values()):
            await asyncio.sleep(SETTLE_S)

    async def _work(self, row: Row, payload: bytes) -> asyncio.Future[bytes]:
        """What became of it; a worker that is lost has done nothing, so the next one is asked, a few times."""
        for _ in range(TRIES):
            await self.whole.wait()
            life = self.lives
            future = self._futures[row.id] = asyncio.wrap_future(self.executor.submit(row.kind, row.lane, payload))
            begun = time.monotonic()
            await asyncio.wait([future])
            self.busy_s[row.kind] = self.busy_s.get(row.kind, 0.0) + time.monotonic() - begun
            del self._futures[row.id]
            if future.cancelled() or not isinstance(future.exception(), BrokenExecutor):
                return future
            if self.kinds[row.kind].ordered and self.revive:
                await self.revive(life)
        return future  # pyrefly: ignore[unbound-name]

    async def _fail(self, ids: str | list[str], error: str, category: str, again: bool = False) -> None:
        """One request, or several at once: after a restart all have failed, or none."""
        ids = [ids] if isinstance(ids, str) else ids
        await self.database.surely(rows.fail, ids, error, category, time.time(), again)
        for request_id in ids:
            self._end(request_id, category)

    def _end(self, request_id: str, outcome: str) -> None:
        """`outcome`: done, or whose fault it was."""
        pending = self.pending.pop(request_id)
        self.counts[pending.kind, outcome] = self.counts.get((pending.kind, outcome), 0) + 1
        pending.ended.set()
        if not self.kinds[pending.kind].ordered:
            self._sampled.set()
            self._sampled = asyncio.Event()

    async def ended_samples(self, lane: str, clone: int, cursor: int, limit_s: float | None) -> tuple[list[Row], int]:
        """Samples that have ended since a cursor, and the next cursor; none when the time is over first."""
        end = time.monotonic() + min(self.patience.hold_s, self.patience.hold_s if limit_s is None else limit_s)
        while True:
            sampled = self._sampled
            found = await self.database.run(rows.ended_since, lane, clone, cursor)
            left = end - time.monotonic()
            if found or left <= 0:
                return found, found[-1].ended if found else cursor
            with suppress(TimeoutError):
                await asyncio.wait_for(sampled.wait(), left)

    async def poll(self, request_id: str, tenant: str) -> Row | None:
        """The request when it has ended; None when the holding time is over first.

        Raises:
            Missing, Gone: as `rows.read_of`.
        """
        pending = self.pending.get(request_id)
        if pending is not None and pending.tenant == tenant:
            try:
                await asyncio.wait_for(pending.ended.wait(), self.patience.hold_s)
            except TimeoutError:
                return None
        row = await self.database.run(rows.read_of, request_id, tenant)
        return None if row.state == rows.WAITING else row

    async def cancel(self, request_id: str, tenant: str) -> None:
        """A sample that was not begun fails; anything else goes on, as later numbers build on it."""
        row = await self.database.run(rows.read_of, request_id, tenant)
        if self.kinds[row.kind].ordered:
            return
        if future := self._futures.get(request_id):
            future.cancel()
        elif request_id in self.pending:
            self.pending[request_id].given_up = True

    async def last_number(self, name: str) -> int:
        """The highest number that a model's requests have so far."""
        lane = await self._lane(name)
        begun = lane.next if lane.task is not None else lane.next - 1
        return max([begun, *lane.waiting])

    def crowd(self, request_id: str) -> int:
        """How many requests of the same model wait, where they are many."""
        pending = self.pending.get(request_id)
        lane = self.lanes.get(pending.lane) if pending else None
        count = len(lane.waiting) if lane else 0
        return count if count > self.patience.crowd else 0

    def waiting_samples(self) -> int:
        return sum(not self.kinds[each.kind].ordered for each in self.pending.values())

    def waiting_bytes(self, tenant: str) -> int:
        return sum(each.size for each in self.pending.values() if each.tenant == tenant)

    async def resume(self) -> None:
        """What an earlier process promised; models must be back before."""
        for row in await self.database.run(rows.waiting):
            lane = await self._lane(row.lane) if self.kinds[row.kind].ordered else None
            self._take(row.id, Pending(row.tenant, row.lane, row.kind, row.size), row.seq_id, lane)

    async def close(self) -> None:
        """Nothing more is begun; what waits is answered by the next process."""
        for pending in self.pending.values():
            pending.ended.set()
        for lane in self.lanes.values():
            if lane.gap is not None:
                lane.gap.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _prepare(connection: Connection, kind: Kind, row: Row) -> bytes | None:
    """What is executed is also what would be executed again."""
    payload = kind.prepare(connection, row)
    if payload != row.payload and kind.changes_model:
        rows.set_payload(connection, row.id, payload)
    return payload


def _complete(connection: Connection, kind: Kind, row: Row, result: bytes) -> int:
    """The answer, and what it means for models and checkpoints, become true together; how many tokens it was about."""
    answer, tokens = kind.complete(connection, row, result), kind.tokens(row, result)
    rows.finish(connection, row.id, answer, time.time(), tokens, again=kind.changes_model)
    return tokens
