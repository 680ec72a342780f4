"""The tables of a server, and the one thread that works on them.

SQLite by default, another database by its URL. What was committed outlives a killed process and a power cut.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")
TABLES = MetaData()


def text(name: str, **options: Any) -> Column:
    return Column(name, String(512), **options)


tenants = Table("tenants", TABLES, text("id", primary_key=True), text("key_hash", unique=True, nullable=False))

sessions = Table(
    "sessions",
    TABLES,
    text("id", primary_key=True),
    text("tenant", nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("seen", Float, nullable=False),  # the last heartbeat
    text("ended"),  # how it finished: success, errored, interrupted, or expired; null while it lives
    Column("tags", JSON),
    Column("user_metadata", JSON),
    text("display_name"),
    text("project_id"),
    text("sdk_version"),
)

models = Table(
    "models",
    TABLES,
    text("id", primary_key=True),
    text("tenant", nullable=False, index=True),
    text("session_id", nullable=False, index=True),
    text("base_model", nullable=False),
    Column("adapter", JSON, nullable=False),  # rank, seed, train_mlp, train_attn, train_unembed
    Column("user_metadata", JSON),
    text("project_id"),
    Column("created", Float, nullable=False),
    Column("used", Float, nullable=False),
    Column("ready", Boolean, nullable=False, default=False),  # once it was made
    Column("unloaded", Boolean, nullable=False, default=False),
    Column("kept_seq", BigInteger),  # the request after which its whole state was kept,
    Column("kept_address", Text),  # and where
    Column("inflight_address", Text),  # the newest weights of its samplers that move along
)

samplers = Table(
    "samplers",
    TABLES,
    text("id", primary_key=True),
    text("tenant", nullable=False),
    text("session_id", nullable=False, index=True),
    text("base_model", nullable=False),
    Column("model_path", Text),  # the named checkpoint that it samples from
    text("model_id"),  # of unnamed weights
    Column("address", Text),  # of its weights; null: the base model's
    Column("inflight", Boolean, nullable=False, default=False),
    Column("created", Float, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    TABLES,
    text("path", primary_key=True),
    text("tenant", nullable=False, index=True),
    text("model_id", nullable=False, index=True),
    text("kind", nullable=False),
    text("name", nullable=False),
    text("base_model", nullable=False),
    Column("adapter", JSON, nullable=False),
    Column("address", Text, nullable=False),
    Column("size_bytes", BigInteger),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("public", Boolean, nullable=False, default=False),
    Column("user_metadata", JSON),
)

requests = Table(
    "requests",
    TABLES,
    text("id", primary_key=True),
    text("tenant", nullable=False),
    text("session_id", nullable=False, index=True),
    text("kind", nullable=False),
    text("lane", nullable=False),  # the model or sampler that it asks
    Column("seq_id", BigInteger, nullable=False),
    Column("payload", LargeBinary),  # kept until the model's state after it is kept
    Column("details", JSON, nullable=False),  # what the worker is not told
    text("state", nullable=False, index=True),  # waiting, done, failed, expired
    Column("result", LargeBinary),
    Column("error", Text),
    text("category"),
    Column("created", Float, nullable=False),
    Column("finished", Float, index=True),
    UniqueConstraint("lane", "seq_id"),
)
Index("requests_by_lane", requests.c.lane, requests.c.state)


def _tune_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def open_engine(url: str) -> Engine:
    """The database with its tables, which are made where they are not there yet."""
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
    TABLES.create_all(engine)
    return engine


class Database:
    """Functions of a connection, each one transaction; one at a time, and never on the event loop's thread."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self._thread = ThreadPoolExecutor(1, "database")

    def _transact(self, work: Callable[..., R], *args: Any, **named: Any) -> R:
        with self.engine.begin() as connection:
            return work(connection, *args, **named)

    async def run(self, work: Callable[Concatenate[Connection, P], R], *args: P.args, **named: P.kwargs) -> R:
        """The result of `work(connection, ...)`; committed when this returns, undone when it raises."""
        future = self._thread.submit(self._transact, work, *args, **named)
        return await asyncio.shield(asyncio.wrap_future(future))  # a client that leaves does not stop a transaction

    def close(self) -> None:
        self._thread.shutdown()
        self.engine.dispose()
