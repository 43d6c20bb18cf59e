"""Statements as values: built once per dialect, compiled once, several of them at once."""

import functools
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql import ClauseElement, Executable
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import FromClause

T = TypeVar("T")


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
    return sa.bindparam(f"p_{name}", type_=type_, required=False, **options)


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the parameters that `bind` made."""
    return {f"p_{name}": str(value) if isinstance(value, StrEnum) else value for name, value in parameters.items()}


class Prepared:
    """A statement that is compiled once and then goes straight to the driver.

    SQLAlchemy's execution costs about as much client time as PostgreSQL's whole round trip; the hot
    statements do without it where they can: on PostgreSQL, without lists and without a `durable_schema`.
    """

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._sql: str | None = None
        self._constants: dict[str, Any] = {}
        self._row: Any = None
        self._has_lists = False

    def __call__(self, conn: Connection, parameters: dict[str, Any]) -> Sequence[Any]:
        """Execute the statement on `conn` and return its rows."""
        if not self._goes_straight(conn):
            return conn.execute(cast(Executable, self._statement), given(parameters)).all()
        values = self._constants | given(parameters)
        driver: Any = conn.connection.driver_connection
        return list(map(self._row, driver.execute(self._sql, values).fetchall()))

    def _goes_straight(self, conn: Connection) -> bool:
        if conn.dialect.name != "postgresql" or "schema_translate_map" in conn.get_execution_options():
            return False
        if self._sql is None:
            self._compile(conn.dialect)
        return not self._has_lists

    def _compile(self, dialect: Dialect) -> None:
        compiled: Any = self._statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        self._constants = {name: value for name, value in compiled.params.items() if not name.startswith("p_")}
        self._has_lists = any(bound.expanding and name.startswith("p_") for name, bound in compiled.binds.items())
        names = [entry.keyname for entry in compiled._result_columns]
        row: Any = namedtuple("Row", names)  # type: ignore[misc]
        self._row = row._make
        self._sql = str(compiled)


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

    def __call__(self, conn: Connection, parameters: dict[str, Any]) -> Sequence[Any]:
        """Execute all on `conn` and return the rows of the first; none means that its guard refused."""
        if conn.dialect.name == "postgresql":
            return self._one_statement()(conn, parameters)
        rows = conn.execute(self.first, given(parameters)).all()
        for row in rows:
            moved = {f"moved_{name}": value for name, value in row._mapping.items()}
            for statement in self._many_statements():
                conn.execute(statement, given(parameters | moved))
        return rows

    def _one_statement(self) -> "Prepared":
        if "one" not in self._forms:
            moved = self.first.cte("moved")
            dependents = [make(moved).cte(f"then_{n}") for n, make in enumerate(self.then)]
            self._forms["one"] = Prepared(sa.select(moved).add_cte(*dependents))
        return self._forms["one"]  # type: ignore[no-any-return]

    def _many_statements(self) -> list[UpdateBase]:
        if "many" not in self._forms:
            returned = self.first.exported_columns
            literals = [bind(f"moved_{c.key}", c.type).label(str(c.key)) for c in returned]
            moved = sa.select(*literals).subquery("moved")
            self._forms["many"] = [make(moved) for make in self.then]
        return self._forms["many"]  # type: ignore[no-any-return]
