"""A transactional step commits what it wrote together with its record, or neither."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session

from celery_durable import Durable, DurableTask, RetryPolicy, current_run, step
from celery_durable.errors import UsageError
from celery_durable.store.database import Database
from celery_durable.store.tables import run

accounts = sa.Table("accounts", sa.MetaData(), sa.Column("entry", sa.Text))


@pytest.fixture(params=["sqlite", "postgres"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Celery]:
    """An app whose store also holds the user's table."""
    url = (
        f"sqlite:///{tmp_path / 's.db'}" if request.param == "sqlite" else request.getfixturevalue("fresh_postgres_url")
    )
    made = Celery("bank", broker="memory://", set_as_current=False)
    durable = Durable(made, store_url=url, retry=RetryPolicy.none())
    durable.migrate()
    with durable.runtime.database.engine.begin() as conn:
        accounts.metadata.create_all(conn)
    yield made
    durable.runtime.database.close()
    made.close()


def run_of(app: Celery, body: Callable[[], Any]) -> Any:
    return app.task(base=DurableTask, shared=False, name=f"bank.{body.__name__}")(body).apply()


def entries(app: Celery) -> list[str]:
    database: Database = app.durable.runtime.database
    return database.once(lambda conn: list(conn.execute(sa.select(accounts.c.entry)).scalars()))


def book(entry: str) -> None:
    current_run().connection.execute(sa.insert(accounts).values(entry=entry))


def test_what_a_transactional_step_writes_is_committed_with_its_record(app: Celery) -> None:
    def transfer() -> None:
        step(book, transactional=True)("100 from ann to bob")

    result = run_of(app, transfer)

    assert result.state == "SUCCESS", result.traceback
    assert entries(app) == ["100 from ann to bob"]
    assert [record.key for record in app.durable.runs.steps(result.id)] == ["book"]


def test_what_a_failing_transactional_step_wrote_is_rolled_back(app: Celery) -> None:
    @step(transactional=True, retry=RetryPolicy.fixed(0.01, max_attempts=3))
    def debit() -> str:
        book("100 from ann")
        if len(attempts) < 2:
            attempts.append("failed")
            raise ValueError("no such account")
        return "done"

    def transfer() -> str:
        return debit()

    attempts: list[str] = []

    result = run_of(app, transfer)

    assert result.get() == "done"
    assert attempts == ["failed", "failed"]
    assert entries(app) == ["100 from ann"]


def test_an_orm_session_joins_the_transaction_of_the_step(app: Celery) -> None:
    @step(transactional=True)
    def debit() -> None:
        with Session(bind=current_run().connection) as session:
            session.execute(sa.insert(accounts).values(entry="by orm"))
            session.flush()

    def transfer() -> None:
        debit()

    assert run_of(app, transfer).state == "SUCCESS"
    assert entries(app) == ["by orm"]


def test_an_error_of_the_users_own_statement_is_the_users_and_is_not_repeated_for_ever(app: Celery) -> None:
    @step(transactional=True)
    def wrong() -> None:
        current_run().connection.exec_driver_sql("SELECT no_such_column FROM accounts")

    def transfer() -> None:
        wrong()

    result = run_of(app, transfer)

    assert result.state == "FAILURE"
    assert "no_such_column" in str(result.result)
    [record] = app.durable.runs.steps(result.id)
    assert (record.key, record.state, record.attempts) == ("wrong", "failed", 1)


def test_a_worker_that_lost_the_run_during_the_step_commits_nothing(app: Celery) -> None:
    if app.durable.runtime.database.engine.dialect.name == "sqlite":
        pytest.skip("nobody else can write to SQLite during a transaction")

    @step(transactional=True)
    def debit() -> None:
        book("100 from ann")
        taken = sa.update(run).where(run.c.id == current_run().id).values(epoch=run.c.epoch + 1)
        app.durable.runtime.database.once(lambda conn: conn.execute(taken))

    def transfer() -> None:
        debit()

    result = run_of(app, transfer)

    assert result.state == "IGNORED"
    assert entries(app) == []
    assert app.durable.runs.steps(result.id) == []


def test_the_connection_has_a_meaning_in_a_transactional_step_only(app: Celery) -> None:
    def transfer() -> None:
        step(lambda: current_run().connection, name="plain")()

    result = run_of(app, transfer)

    assert isinstance(result.result, UsageError)
    assert "@step(transactional=True)" in str(result.result)


KILLED = """
import os, sys
import sqlalchemy as sa
from celery import Celery
from celery_durable import Durable, DurableTask, RetryPolicy, current_run, step

app = Celery("bank", broker="memory://")
durable = Durable(app, store_url=sys.argv[1], lease=0.5, sweep_interval=0.1)

@step(transactional=True)
def debit() -> None:
    current_run().connection.exec_driver_sql("INSERT INTO accounts VALUES ('100 from ann')")
    if sys.argv[3] == "in":
        os.kill(os.getpid(), 9)

@app.task(base=DurableTask, name="bank.transfer")
def transfer() -> None:
    debit()
    if sys.argv[3] == "after":
        os.kill(os.getpid(), 9)

transfer.apply(task_id=sys.argv[2])
"""


@pytest.mark.parametrize(("when", "left"), [("in", []), ("after", ["100 from ann"])])
def test_a_kill_leaves_the_write_and_the_record_or_neither(app: Celery, when: str, left: list[str]) -> None:
    url = app.durable.runtime.database.url.render_as_string(hide_password=False)

    killed = subprocess.run([sys.executable, "-c", KILLED, url, "run-1", when], env=os.environ, check=False)

    assert killed.returncode == -9
    assert entries(app) == left
    assert [record.key for record in app.durable.runs.steps("run-1")] == ["debit"] * len(left)
