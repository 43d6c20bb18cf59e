"""SQL that PostgreSQL and SQLite write differently: instants, the store's clock, rows as JSON."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

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
    shift = f", round({later}, 3) || ' seconds'" if later else ""  # null stays null
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
