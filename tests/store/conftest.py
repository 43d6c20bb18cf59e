"""A migrated, empty store for each test: once on SQLite, once on PostgreSQL."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_durable.store import schema
from celery_durable.store.database import Database
from celery_durable.store.tables import metadata


@pytest.fixture(scope="session")
def migrated_sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with empty tables, to be copied."""
    file = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    database = Database(f"sqlite:///{file}")
    schema.migrate(database)
    database.close()
    return file


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL database with tables, for the whole session."""
    migrating = Database(postgres_url)
    schema.migrate(migrating)
    migrating.close()
    database = Database(postgres_url)
    yield database
    database.close()


@pytest.fixture
def sqlite(migrated_sqlite_file: Path, tmp_path: Path) -> Iterator[Database]:
    """An empty store in an SQLite file."""
    database = Database(f"sqlite:///{shutil.copy(migrated_sqlite_file, tmp_path / 'store.db')}")
    sa.event.listen(database.engine, "connect", _do_not_sync)
    yield database
    database.close()


@pytest.fixture
def postgres(migrated_postgres: Database) -> Database:
    """An empty store in PostgreSQL."""
    # Faster than TRUNCATE, which makes new files for every table and index.
    emptied = "; ".join(f"DELETE FROM {table.name}" for table in metadata.sorted_tables)
    migrated_postgres.once(lambda conn: conn.exec_driver_sql(emptied))
    return migrated_postgres


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty store; a test that asks for it runs on each kind."""
    found: Database = request.getfixturevalue(request.param)
    return found


def _do_not_sync(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF").close()  # only a crash of the machine could tell
