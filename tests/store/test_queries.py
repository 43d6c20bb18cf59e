"""What people read of runs is what is stored."""

from datetime import timedelta

import pytest

from celery_durable.states import LIVE, SUSPENDED, TERMINAL, RunState, StepState
from celery_durable.store import queries
from celery_durable.store.database import Database
from celery_durable.store.queries import Run
from tests.factory import Made, advance, make_record, make_run


def get(database: Database, made: Made) -> Run:
    found = database.once(lambda conn: queries.get(conn, made.id))
    assert found is not None
    return found


def test_an_unknown_run_is_none_and_has_neither_steps_nor_history(database: Database) -> None:
    assert database.once(lambda conn: queries.get(conn, "unknown")) is None
    assert database.once(lambda conn: queries.steps_of(conn, "unknown")) == []
    assert database.once(lambda conn: queries.history_of(conn, "unknown")) == []


@pytest.mark.parametrize("state", RunState)
def test_a_run_reads_as_it_stands(database: Database, state: RunState) -> None:
    made = make_run(database, state=state, tags='["vip"]')

    found = get(database, made)

    assert (found.id, found.task, found.state, found.tags) == (made.id, "shop.order", state, ("vip",))
    assert (found.wake_at is not None) is (state in SUSPENDED)
    assert (found.finished_at is not None) is (state in TERMINAL)
    assert found.created_at.tzinfo is not None
    if state in LIVE:
        assert (found.result, found.error, found.error_code) == (None, None, None)


def test_a_result_reads_as_its_value_and_an_error_as_its_text(database: Database) -> None:
    succeeded = get(database, make_run(database, state=RunState.SUCCEEDED))
    failed = get(database, make_run(database, state=RunState.FAILED))

    assert (succeeded.result, succeeded.error) == (42, None)
    assert (failed.result, failed.error, failed.error_code) == (None, "KeyError: gone", "exception")


def test_runs_are_listed_newest_first_by_task_and_state(database: Database) -> None:
    first = make_run(database)
    advance(database, timedelta(minutes=1))
    second = make_run(database, task="shop.refund")
    advance(database, timedelta(minutes=1))
    third = make_run(database, state=RunState.RUNNING)

    def listed(**filters: object) -> list[str]:
        return [run.id for run in database.once(lambda conn: queries.latest(conn, **filters))]  # type: ignore[arg-type]

    assert listed() == [third.id, second.id, first.id]
    assert listed(limit=2) == [third.id, second.id]
    assert listed(task="shop.refund") == [second.id]
    assert listed(state="running") == [third.id]
    assert listed(task="shop.order", state="pending") == [first.id]


def test_steps_read_in_the_order_in_which_they_were_made(database: Database) -> None:
    records = [
        make_record("zeta", seq=1, output='{"a": 1}'),
        make_record("alpha", seq=2, state=StepState.FAILED, output=None, error=_ERROR),
    ]
    made = make_run(database, state=RunState.RUNNING, records=records)

    steps = database.once(lambda conn: queries.steps_of(conn, made.id))

    assert [(step.key, step.state, step.output, step.error) for step in steps] == [
        ("zeta", StepState.SUCCEEDED, {"a": 1}, None),
        ("alpha", StepState.FAILED, None, "ValueError: no"),
    ]


_ERROR = '{"type": "builtins:ValueError", "message": "no"}'


def test_a_history_begins_with_the_start(database: Database) -> None:
    made = make_run(database, state=RunState.WAITING)

    entries = database.once(lambda conn: queries.history_of(conn, made.id))

    assert [(entry.what, entry.epoch) for entry in entries] == [("start", 0), ("claim", 1), ("suspend", 1)]
    assert [entry.at for entry in entries] == sorted(entry.at for entry in entries)


def test_ids_and_texts_are_never_read_as_sql(database: Database) -> None:
    nasty = "x'; DROP TABLE durable_run; -- %s %(p_id)s :p_id ? \\"
    made = make_run(database, state=RunState.RUNNING, run_id=nasty, task=nasty, queue=nasty)

    found = get(database, made)

    assert (found.id, found.task, found.queue) == (nasty, nasty, nasty)
