"""Connections, the store's clock, and all that differs between PostgreSQL and SQLite.

An engine belongs to the process that made it: a forked child opens its own. Every operation is one
statement, or on SQLite one short transaction, so that repeating it after a lost connection is safe
whenever its statement is guarded.
"""

import functools
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Dialect, Engine, Row, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import Executable
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import FromClause

from celery_durable.errors import DurableError, SchemaError, SettingsError, StoreUnavailable

__all__ = ["Connection", "Database", "Instant", "Together", "bind", "given", "now", "per_dialect", "rows_as_json"]
__all__ += ["seconds_until"]

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_SQLITE_FORMAT = "%Y-%m-%d %H:%M:%f000"  # as SQLAlchemy and Django write instants


class Instant(sa.types.TypeDecorator[datetime]):
    """An aware datetime; SQLite keeps it as UTC text."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give SQLite the instant in UTC."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Say that what SQLite kept was UTC."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class now(FunctionElement[datetime]):
    """The store's clock; with an argument, that many seconds later."""

    inherit_cache = True
    type = Instant()


class seconds_until(FunctionElement[float]):
    """How many seconds an instant lies ahead of the store's clock; negative when it has passed."""

    inherit_cache = True
    type = sa.Float()


class rows_as_json(FunctionElement[str]):
    """An aggregate: the given columns of all rows as the text of one JSON array of arrays, or null."""

    inherit_cache = True
    type = sa.Text()


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **options: Any) -> str:
    # statement_timestamp() and not clock_timestamp(): only a stable function can bound an index scan.
    later = compiler.process(element.clauses, **options)
    return f"(statement_timestamp() + make_interval(secs => {later}))" if later else "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **options: Any) -> str:
    later = compiler.process(element.clauses, **options)
    shift = f", printf('%+.3f seconds', {later})" if later else ""
    return f"strftime('{_SQLITE_FORMAT}', 'now'{shift})"


@compiles(seconds_until, "postgresql")
def _until_postgresql(element: seconds_until, compiler: Any, **options: Any) -> str:
    at = compiler.process(element.clauses, **options)
    return f"CAST(extract(epoch FROM {at} - statement_timestamp()) AS double precision)"


@compiles(seconds_until, "sqlite")
def _until_sqlite(element: seconds_until, compiler: Any, **options: Any) -> str:
    return f"((julianday({compiler.process(element.clauses, **options)}) - julianday('now')) * 86400.0)"


@compiles(rows_as_json, "postgresql")
def _rows_postgresql(element: rows_as_json, compiler: Any, **options: Any) -> str:
    return f"CAST(json_agg(json_build_array({compiler.process(element.clauses, **options)})) AS text)"


@compiles(rows_as_json, "sqlite")
def _rows_sqlite(element: rows_as_json, compiler: Any, **options: Any) -> str:
    return f"json_group_array(json_array({compiler.process(element.clauses, **options)}))"


def per_dialect(build: Callable[..., T]) -> Callable[..., T]:
    """Build a statement once per dialect; `build` is handed that dialect's `insert`, callers hand a connection."""
    inserts = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}

    @functools.cache
    def built(dialect: str, *args: Any) -> T:
        return build(inserts[dialect], *args)

    @functools.wraps(build)
    def choose(conn: Connection, *args: Any) -> T:
        return built(conn.dialect.name, *args)

    return choose


def bind(name: str, type_: Any = sa.Text, **options: Any) -> sa.BindParameter[Any]:
    """Return a parameter; its prefix keeps it apart from a column of the same name."""
    return sa.bindparam(f"p_{name}", type_=type_, **options)


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the parameters that `bind` made."""
    return {f"p_{name}": value for name, value in parameters.items()}


@dataclass(frozen=True)
class Together:
    """One guarded statement with RETURNING, and those that depend on it: all take effect or none does.

    PostgreSQL gets a single statement with data-modifying CTEs. SQLite, which has none, gets one after
    the other inside the caller's transaction, and the dependent ones only when the first moved a row.

    Args:
        first: the guarded statement.
        then: functions that are given a FROM clause with the returned columns and return the statements
            that select from it.
    """

    first: UpdateBase
    then: Sequence[Callable[[FromClause], UpdateBase]]
    _forms: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, conn: Connection, parameters: dict[str, Any]) -> Sequence[Row[Any]]:
        """Execute all on `conn` and return the rows of the first; none means that its guard refused."""
        if conn.dialect.name == "postgresql":
            return conn.execute(self._one_statement(), given(parameters)).all()
        rows = conn.execute(self.first, given(parameters)).all()
        for row in rows:
            moved = {f"moved_{name}": value for name, value in row._mapping.items()}
            for statement in self._many_statements():
                conn.execute(statement, given(parameters | moved))
        return rows

    def _one_statement(self) -> Executable:
        if "one" not in self._forms:
            moved = self.first.cte("moved")
            dependents = [make(moved).cte(f"then_{n}") for n, make in enumerate(self.then)]
            self._forms["one"] = sa.select(moved).add_cte(*dependents)
        return self._forms["one"]  # type: ignore[no-any-return]

    def _many_statements(self) -> list[UpdateBase]:
        if "many" not in self._forms:
            returned = self.first.exported_columns
            literals = [bind(f"moved_{c.key}", c.type).label(str(c.key)) for c in returned]
            moved = sa.select(*literals).subquery("moved")
            self._forms["many"] = [make(moved) for make in self.then]
        return self._forms["many"]  # type: ignore[no-any-return]


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
        self._pid = 0

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        if self._engine is None or self._pid != os.getpid():
            # What a parent process opened stays the parent's; closing it here would end its sessions. No lock:
            # a fork could copy it locked, and two engines made at once are merely one too many.
            self._engine, self._pid = self._create_engine(), os.getpid()
        return self._engine

    def close(self) -> None:
        """Close the connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
        self._engine = None

    def once(self, operation: Callable[[Connection], T]) -> T:
        """Run `operation` on a connection: on PostgreSQL in autocommit, on SQLite as one transaction.

        Raises:
            StoreUnavailable: when the store does not answer; the operation may or may not have taken effect.
            SchemaError: when its tables are missing.
        """
        try:
            with self._connect() as conn:
                try:
                    return operation(conn)
                except (DBAPIError, DurableError):
                    raise
                except BaseException:
                    conn.invalidate()  # a time limit may have struck in the middle of a reply
                    raise
        except (DBAPIError, PoolTimeout) as error:
            raise self._translated(error) from error

    def patiently(self, operation: Callable[[Connection], T], give_up: Callable[[], bool] = lambda: False) -> T:
        """Run `operation` like `once`, again and again while the store does not answer.

        Raises:
            StoreUnavailable: when the store does not answer and `give_up` says so.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                return self.once(operation)
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

    def _connect(self) -> Any:
        return self.engine.connect() if self.engine.dialect.name == "postgresql" else self.engine.begin()

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
            connect_args={**patience, "application_name": "celery-durable"} | dict(self.url.query),
        )
        return engine.execution_options(schema_translate_map={None: self.schema}) if self.schema else engine

    def _translated(self, error: DBAPIError | PoolTimeout) -> Exception:
        first_line = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        where = self.url.render_as_string(hide_password=True)
        state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
        if state in ("42P01", "3F000") or "no such table" in first_line:
            return SchemaError(f"the store {where} has no tables yet; run: celery -A <app> durable migrate")
        if state == "42703" or "no such column" in first_line:
            return SchemaError(
                f"the tables of {where} are older than this release; run: celery -A <app> durable migrate"
            )
        if isinstance(error, PoolTimeout) or _is_outage(error, state):
            return StoreUnavailable(f"the store {where} does not answer: {first_line}")
        return error


def _is_outage(error: DBAPIError, state: str) -> bool:
    # 25006: a standby that has not been promoted yet; 40: serialization and deadlock, safe to repeat.
    return (
        error.connection_invalidated
        or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
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
