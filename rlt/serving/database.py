"""The tables of a server, and the one thread that works on them.

SQLite by default, PostgreSQL by its URL. What was committed outlives a killed process and a power cut. A transaction
that a lost connection or a full disk undid is begun again.
"""

import asyncio
import logging
import time
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
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from rlt.errors import Refused
from rlt.serving.errors import Unavailable

AGAIN_S = (0.1, 0.4, 1.5, 3.0)  # waits between tries of a transaction
SURELY_S = 2.0
POSTGRESQL = "postgresql+psycopg"

logger = logging.getLogger("rlt")

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
    Column("clients", BigInteger, nullable=False, default=0),  # that joined the one which made it
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

# What each pass and step of a model said of itself, for curves.
metrics = Table(
    "metrics",
    TABLES,
    text("model_id", primary_key=True),
    Column("seq_id", BigInteger, primary_key=True),
    text("kind", nullable=False),
    Column("figures", JSON, nullable=False),
)

# Single texts of the server's own, such as what its links are signed with.
notes = Table("notes", TABLES, text("name", primary_key=True), Column("text", Text, nullable=False))

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
    Column("tokens", BigInteger, nullable=False, default=0),  # that were read or made
    Column("error", Text),
    text("category"),
    Column("created", Float, nullable=False),
    Column("finished", Float, index=True),
    Column("ended", BigInteger),  # grows from one that ended to the next
    UniqueConstraint("lane", "seq_id"),
)
Index("requests_by_lane", requests.c.lane, requests.c.state)
Index("requests_by_end", requests.c.lane, requests.c.ended)


def _tune_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def read_url(url: str) -> URL:
    """
    Raises:
        Refused: it is none, of which nothing is shown, as it may hold a password.
    """
    try:
        read = make_url(url)
    except ArgumentError:
        raise Refused("database is no URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME would do") from None
    return read.set(drivername=POSTGRESQL) if read.drivername in ("postgres", "postgresql") else read


def open_engine(url: str) -> Engine:
    """The database with its tables, which are made where they are not there yet.

    Raises:
        Refused: there is no such database, or it does not answer.
    """
    read = read_url(url)
    try:
        engine = create_engine(read, pool_pre_ping=True, hide_parameters=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _tune_sqlite)
        TABLES.create_all(engine)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise Refused(f"database is of {read.drivername}: sqlite and {POSTGRESQL} are known here") from error
    except DBAPIError as error:
        raise Refused(f"database={read}: {said_by(error)}") from error
    return engine


def said_by(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


class Database:
    """Functions of a connection, each one transaction; one at a time, and never on the event loop's thread."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self._thread = ThreadPoolExecutor(1, "database")

    def _transact(self, work: Callable[..., R], *args: Any, **named: Any) -> R:
        for wait in (*AGAIN_S, None):
            try:
                with self.engine.begin() as connection:
                    return work(connection, *args, **named)
            except (OperationalError, InterfaceError) as error:
                if wait is None:
                    raise Unavailable(f"the database says: {said_by(error)}") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    async def run(self, work: Callable[Concatenate[Connection, P], R], *args: P.args, **named: P.kwargs) -> R:
        """The result of `work(connection, ...)`; committed when this returns, undone when it raises.

        Raises:
            Unavailable: the database did not answer within some seconds, or has no room.
        """
        future = self._thread.submit(self._transact, work, *args, **named)
        return await asyncio.shield(asyncio.wrap_future(future))  # a client that leaves does not stop a transaction

    async def surely(self, work: Callable[Concatenate[Connection, P], R], *args: P.args, **named: P.kwargs) -> R:
        """The same, however long it takes: for what must not be left half done."""
        while True:
            try:
                return await self.run(work, *args, **named)
            except Unavailable as error:
                logger.warning("%s", error)
                await asyncio.sleep(SURELY_S)

    def close(self) -> None:
        self._thread.shutdown()
        self.engine.dispose()
