"""Tables are made once, where they were asked for; what does not fit is refused in a sentence."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import make_url

from celery_durable.errors import SchemaError, StoreUnavailable
from celery_durable.states import RunState
from celery_durable.store import queries, runs, schema
from celery_durable.store.database import Database
from celery_durable.store.tables import metadata
from tests.factory import RESEND, make_record, make_run, new_run, state_of, suspend
from tests.servers import plain

TABLES = {*metadata.tables, schema.VERSION_TABLE}
ROOT = Path(__file__).parents[2]
#: Ten processes, forked so that all of them come at the same moment; it says how each ended.
MIGRATE = """
import os, sys
from celery_durable.store import schema
from celery_durable.store.database import Database
schema.head()
begin, go = os.pipe()
pids = []
for _ in range(10):
    pids.append(os.fork())
    if pids[-1] == 0:
        os.close(go)
        os.read(begin, 1)
        schema.migrate(Database(sys.argv[1]))
        os._exit(0)
os.close(go)
print([os.waitpid(pid, 0)[1] for pid in pids])
"""


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    url: str = request.getfixturevalue("fresh_postgres_url")
    return url


@pytest.fixture
def open_database() -> Iterator[Callable[..., Database]]:
    """A function that opens databases which are closed after the test."""
    opened: list[Database] = []

    def open_(url: str, schema_name: str | None = None) -> Database:
        opened.append(Database(url, schema_name))
        return opened[-1]

    yield open_
    for database in opened:
        database.close()


Open = Callable[..., Database]


def tables_of(database: Database, schema_name: str | None = None) -> set[str]:
    return set(database.once(lambda conn: sa.inspect(conn).get_table_names(schema=schema_name)))


def set_version(database: Database, version: str) -> None:
    statement = sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = :version")
    database.once(lambda conn: conn.execute(statement, {"version": version}))


def live_through(database: Database) -> None:
    """Take a run through its life, to show that every table is usable."""
    made = make_run(database, state=RunState.RUNNING, records=[make_record()])
    assert suspend(database, made, due_in=RESEND)
    assert database.once(lambda conn: queries.get(conn, made.id)) is not None
    assert len(database.once(lambda conn: queries.history_of(conn, made.id))) == 3


def test_migrating_makes_the_tables_that_the_code_uses(empty_url: str, open_database: Open) -> None:
    assert schema.migrate(open_database(empty_url)) == schema.head()

    database = open_database(empty_url)
    assert tables_of(database) == TABLES
    database.once(schema.check)
    live_through(database)


def test_migrating_again_changes_nothing(empty_url: str, open_database: Open) -> None:
    schema.migrate(open_database(empty_url))
    made = make_run(open_database(empty_url))

    assert schema.migrate(open_database(empty_url)) == schema.head()

    assert state_of(open_database(empty_url), made) is RunState.PENDING


def test_the_migrations_make_what_the_tables_of_the_code_say(empty_url: str, open_database: Open) -> None:
    schema.migrate(open_database(empty_url))

    def differences(conn: sa.Connection) -> list[object]:
        options = {"compare_type": True, "version_table": schema.VERSION_TABLE}
        return list(compare_metadata(MigrationContext.configure(conn, opts=options), metadata))

    assert open_database(empty_url).once(differences) == []


def test_the_store_admits_exactly_the_states_of_the_code(empty_url: str, open_database: Open) -> None:
    schema.migrate(open_database(empty_url))
    database = open_database(empty_url)
    made = make_run(database)

    def set_state(state: str) -> None:
        database.once(lambda conn: conn.execute(sa.text("UPDATE durable_run SET state = :state"), {"state": state}))

    for state in RunState:
        set_state(state)
        assert state_of(database, made) is state
    with pytest.raises(sa.exc.IntegrityError):
        set_state("lost")


def test_what_is_written_after_a_migration_through_the_same_store_is_committed(
    empty_url: str, open_database: Open
) -> None:
    database = open_database(empty_url)
    schema.migrate(database)

    made = make_run(database)

    assert open_database(empty_url).once(lambda conn: queries.get(conn, made.id)) is not None


def test_an_operation_that_fails_in_a_transaction_leaves_nothing(empty_url: str, open_database: Open) -> None:
    database = open_database(empty_url)
    schema.migrate(database)
    new = new_run()

    def start_and_fail(conn: sa.Connection) -> None:
        runs.start(conn, new, due_in=RESEND)
        raise KeyError(new.id)

    with pytest.raises(KeyError):
        database.atomically(start_and_fail)

    assert open_database(empty_url).once(lambda conn: queries.get(conn, new.id)) is None


def test_ten_processes_may_migrate_at_once(empty_url: str, open_database: Open) -> None:
    command = [sys.executable, "-c", MIGRATE, empty_url]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert ended.stdout.strip() == str([0] * 10), ended.stderr
    assert tables_of(open_database(empty_url)) == TABLES


# -- what does not fit ------------------------------------------------------------------------------


def test_a_store_without_tables_is_refused_with_the_command_that_makes_them(
    empty_url: str, open_database: Open
) -> None:
    database = open_database(empty_url)

    with pytest.raises(SchemaError, match="has no tables yet; run: celery -A <app> durable migrate"):
        database.once(schema.check)
    with pytest.raises(SchemaError, match="has no tables yet; run: celery -A <app> durable migrate"):
        database.once(lambda conn: runs.start(conn, new_run(), due_in=RESEND))


def test_tables_of_a_later_release_are_refused(empty_url: str, open_database: Open) -> None:
    schema.migrate(open_database(empty_url))
    database = open_database(empty_url)
    set_version(database, "9999")
    sentence = "the tables are of version 9999, which this release does not know; upgrade celery-durable"

    with pytest.raises(SchemaError, match=sentence):
        database.once(schema.check)
    with pytest.raises(SchemaError, match=sentence):
        schema.migrate(database)


def test_tables_of_an_earlier_release_are_refused(
    empty_url: str, open_database: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.migrate(open_database(empty_url))
    database = open_database(empty_url)
    monkeypatch.setattr(schema, "_known", lambda: ["0009", "0001"])  # as if released later

    with pytest.raises(SchemaError, match="are of version 0001, this release needs 0009; run: celery -A <app> durable"):
        database.once(schema.check)


def test_a_table_that_lacks_a_column_is_called_older(empty_url: str, open_database: Open) -> None:
    schema.migrate(open_database(empty_url))
    database = open_database(empty_url)
    database.once(lambda conn: conn.execute(sa.text("ALTER TABLE durable_run DROP COLUMN queue")))

    with pytest.raises(SchemaError, match="are older than this release; run: celery -A <app> durable migrate"):
        make_run(database)


# -- printed statements, other schemas --------------------------------------------------------------


@pytest.mark.parametrize("schema_name", [None, "shop durable"])
def test_the_printed_statements_make_a_working_store(
    fresh_postgres_url: str, open_database: Open, schema_name: str | None
) -> None:
    printed = schema.sql(open_database(fresh_postgres_url, schema_name))

    with psycopg.connect(plain(fresh_postgres_url)) as conn:
        conn.execute(printed)

    database = open_database(fresh_postgres_url, schema_name)
    database.once(schema.check)
    assert tables_of(database, schema_name) == TABLES
    live_through(database)


def test_the_printed_statements_for_sqlite_make_a_working_store(tmp_path: Path, open_database: Open) -> None:
    file = tmp_path / "printed.db"
    printed = schema.sql(open_database(f"sqlite:///{tmp_path / 'other.db'}"))

    with sqlite3.connect(file) as conn:
        conn.executescript(printed)
    conn.close()

    database = open_database(f"sqlite:///{file}")
    database.once(schema.check)
    live_through(database)


def test_printing_the_statements_needs_no_server(open_database: Open) -> None:
    printed = schema.sql(open_database("postgresql://nobody@127.0.0.1:1/nowhere"))

    assert "CREATE TABLE durable_run" in printed


def test_all_tables_are_made_in_the_schema_that_was_asked_for(fresh_postgres_url: str, open_database: Open) -> None:
    schema.migrate(open_database(fresh_postgres_url, "shop durable"))

    database = open_database(fresh_postgres_url, "shop durable")
    database.once(schema.check)
    live_through(database)
    assert tables_of(database, "shop durable") == TABLES
    assert tables_of(database, "public") == set()


def test_two_schemas_of_one_database_hold_two_stores(fresh_postgres_url: str, open_database: Open) -> None:
    for name in (None, "other"):
        schema.migrate(open_database(fresh_postgres_url, name))
    here, there = open_database(fresh_postgres_url), open_database(fresh_postgres_url, "other")

    made = make_run(here)

    assert there.once(lambda conn: queries.get(conn, made.id)) is None
    assert here.once(lambda conn: queries.get(conn, made.id)) is not None
    live_through(there)


# -- connections ------------------------------------------------------------------------------------


def test_threads_share_the_connections_of_a_store(postgres: Database) -> None:
    made = make_run(postgres)
    few = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            states = list(pool.map(lambda _: state_of(postgres, made), range(2000)))
    finally:
        sys.setswitchinterval(few)

    assert set(states) == {RunState.PENDING}


def test_a_store_that_dropped_our_connections_is_used_again_at_once(
    fresh_postgres_url: str, open_database: Open
) -> None:
    schema.migrate(open_database(fresh_postgres_url))
    database = open_database(fresh_postgres_url)
    made = make_run(database)
    mine = make_url(fresh_postgres_url).database
    with psycopg.connect(plain(fresh_postgres_url), autocommit=True) as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            [mine],
        )

    def read() -> RunState:
        try:
            return state_of(database, made)
        except StoreUnavailable:
            return state_of(database, made)

    assert read() is RunState.PENDING


@pytest.mark.parametrize("url", ["postgresql://user:hunter2@127.0.0.1:1/shop", "sqlite:////nowhere/at/all.db"])
def test_a_store_that_does_not_answer_is_named_without_its_password(open_database: Open, url: str) -> None:
    with pytest.raises(StoreUnavailable, match=r"^the store .* does not answer: ") as caught:
        open_database(url).once(lambda conn: runs.start(conn, new_run(), due_in=RESEND))

    assert "hunter2" not in str(caught.value)
