"""Connections, and what the store's errors mean.

An engine belongs to the process that made it: a forked child opens its own. Every operation is one
statement, or on SQLite one short transaction, so that repeating it after a lost connection is safe
whenever its statement is guarded.
"""

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_durable.errors import DurableError, SchemaError, SettingsError, StoreUnavailable

__all__ = ["Connection", "Database"]

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_MOST_IDLE = 5
_DRIVER_ERRORS = (psycopg.Error, sqlite3.Error)


class Database:
    """The store as one process sees it.

    Args:
        url: an SQLAlchemy URL; `postgresql://` means psycopg 3.
        schema: the PostgreSQL schema of the tables.
    """

    def __init__(self, url: str | URL, schema: str | None = None) -> None:
        self.url = _parsed(url)
        self.schema = schema
        self._engine: Engine | None = None
        self._idle: deque[Connection] = deque()
        self._pid = 0
        self._not_forking: Any = contextlib.nullcontext()
        if self.url.get_backend_name() == "sqlite":
            self._keep_sqlite_out_of_forks()

    def _keep_sqlite_out_of_forks(self) -> None:
        """Have no connection open while this process forks.

        SQLite keeps its locks per process. A child that inherits an open connection believes in locks that
        nobody holds, and waits for them for ever (https://www.sqlite.org/howtocorrupt.html, section 2.6).
        """
        self._not_forking = threading.RLock()
        this = weakref.ref(self)

        def before() -> None:
            if (database := this()) is not None:
                database._not_forking.__enter__()
                database.close()

        def in_parent() -> None:
            if (database := this()) is not None:
                database._not_forking.__exit__(None, None, None)

        def in_child() -> None:
            if (database := this()) is not None:
                database._not_forking = threading.RLock()

        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        if self._engine is None or self._pid != os.getpid():
            # What a parent process opened stays the parent's; closing it here would end its sessions. No lock:
            # a fork could copy it locked, and two engines made at once are merely one too many.
            self._idle = deque()
            self._engine, self._pid = self._create_engine(), os.getpid()
        return self._engine

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            while (conn := self._idle_connection()) is not None:
                conn.close()
            self._engine.dispose()
        self._engine = None

    def _idle_connection(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:  # none there, or another thread was faster
            return None

    def once(self, operation: Callable[[Connection], T]) -> T:
        """Run `operation` on a connection: on PostgreSQL in autocommit, on SQLite as one transaction.

        Raises:
            StoreUnavailable: when the store does not answer; the operation may or may not have taken effect.
            SchemaError: when its tables are missing.
        """
        try:
            return self._attempt(operation)
        except (DBAPIError, PoolTimeout, *_DRIVER_ERRORS) as error:
            translated = self._translated(error)
            if translated is error:
                raise
            if not isinstance(translated, StoreUnavailable):
                raise translated from error
        self.close()  # a store that was restarted has left every idle connection stale, and not only this one
        try:
            return self._attempt(operation)
        except (DBAPIError, PoolTimeout, *_DRIVER_ERRORS) as error:
            raise self._translated(error) from error

    def _attempt(self, operation: Callable[[Connection], T]) -> T:
        engine, idle = self.engine, self._idle
        if engine.dialect.name != "postgresql":
            with self._not_forking, engine.begin() as conn:
                return operation(conn)
        # The engine's pool bounds the connections; a few stay out of it, because giving one back and getting
        # it again costs a third of a step.
        conn = self._idle_connection() or engine.connect()
        try:
            result = operation(conn)
        except BaseException as error:
            if not isinstance(error, DurableError):
                conn.invalidate()  # it is broken, or a time limit struck in the middle of a reply
            conn.close()
            raise
        if conn.in_transaction():
            conn.rollback()  # what SQLAlchemy calls a transaction; the server knows of none
        # One that was used for a transaction has left autocommit; the pool puts it back.
        if len(idle) < _MOST_IDLE and "isolation_level" not in conn.get_execution_options():
            idle.append(conn)
        else:
            conn.close()
        return result

    def patiently(
        self,
        operation: Callable[[Connection], T],
        give_up: Callable[[], bool] = lambda: False,
        *,
        atomically: bool = False,
    ) -> T:
        """Run `operation` like `once`, or `atomically`, again and again while the store does not answer.

        Raises:
            StoreUnavailable: when the store does not answer and `give_up` says so.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                return self.atomically(operation) if atomically else self.once(operation)
            except StoreUnavailable:
                if give_up():
                    raise
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(_LONGEST_PAUSE, pause * 2)

    def atomically(self, operation: Callable[[Connection], T]) -> T:
        """Run `operation` like `once`, on PostgreSQL too as one transaction."""

        def in_transaction(conn: Connection) -> T:
            if conn.in_transaction():
                return operation(conn)
            with conn.execution_options(isolation_level="READ COMMITTED").begin():
                return operation(conn)

        return self.once(in_transaction)

    def _create_engine(self) -> Engine:
        if self.url.get_backend_name() == "sqlite":
            engine = sa.create_engine(self.url, connect_args={"timeout": 30, "check_same_thread": False})
            sa.event.listen(engine, "connect", _set_up_sqlite)
            sa.event.listen(engine, "begin", _begin_immediate)
            return engine
        patience = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 15_000}
        engine = sa.create_engine(
            self.url,
            isolation_level="AUTOCOMMIT",  # no BEGIN and COMMIT around single statements
            pool_size=5,
            max_overflow=15,
            pool_use_lifo=True,
            pool_reset_on_return=None,  # nothing to roll back
            connect_args={**patience, "application_name": "celery-durable"} | dict(self.url.query),
        )
        return engine.execution_options(schema_translate_map={None: self.schema}) if self.schema else engine

    def _translated(self, error: Exception) -> Exception:
        driver_error = getattr(error, "orig", None) or error
        first_line = str(driver_error).strip().partition("\n")[0]
        where = self.url.render_as_string(hide_password=True)
        state = getattr(driver_error, "sqlstate", None) or ""
        if state in ("42P01", "3F000") or "no such table" in first_line:
            return SchemaError(f"the store {where} has no tables yet; run: celery -A <app> durable migrate")
        if state == "42703" or "no such column" in first_line or "has no column" in first_line:
            return SchemaError(
                f"the tables of {where} are older than this release; run: celery -A <app> durable migrate"
            )
        if isinstance(error, PoolTimeout) or _is_outage(driver_error, state):
            return StoreUnavailable(f"the store {where} does not answer: {first_line}")
        return error


def _is_outage(error: Any, state: str) -> bool:
    # 25006: a standby that has not been promoted yet; 40: serialization and deadlock, safe to repeat.
    return (
        isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | sqlite3.OperationalError)
        or state == "25006"
        or state.startswith(("40", "57P", "08"))
    )


def _parsed(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(f"expected durable_store_url as postgresql://… or sqlite:///…, got: {url!r}") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("postgresql+psycopg", "sqlite", "sqlite+pysqlite"):
        raise SettingsError(
            f"expected durable_store_url as postgresql://… or sqlite:///…, got: {parsed.drivername}://…"
        )
    return parsed


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event begins, see _begin_immediate
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_immediate(conn: Connection) -> None:
    # A deferred transaction that turns into a writer fails at once when another writer was faster.
    conn.exec_driver_sql("BEGIN IMMEDIATE")
