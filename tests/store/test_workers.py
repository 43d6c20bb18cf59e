"""Workers know how many share the store and when the next run is due."""

from datetime import timedelta

import pytest

from celery_durable.states import RunState
from celery_durable.store import workers
from celery_durable.store.database import Database
from celery_durable.store.workers import Outlook
from tests.factory import RESEND, advance, make_run

MINUTE = timedelta(minutes=1)


def check_in(database: Database, worker: str = "w1", seen_for: timedelta = MINUTE) -> Outlook:
    return database.once(lambda conn: workers.check_in(conn, worker, f"celery@{worker}", seen_for=seen_for))


def test_a_worker_alone_on_an_empty_store_has_nothing_to_wait_for(database: Database) -> None:
    assert check_in(database) == Outlook(workers=1, next_due=None)


def test_every_worker_that_has_checked_in_is_counted(database: Database) -> None:
    for name in ("w1", "w2", "w3"):
        check_in(database, name)

    assert [check_in(database, name).workers for name in ("w1", "w2", "w3")] == [3, 3, 3]


def test_a_worker_counts_itself_when_it_checks_in_for_the_first_time(database: Database) -> None:
    check_in(database, "w1")

    assert check_in(database, "w2").workers == 2


def test_a_worker_that_went_silent_counts_itself_when_it_comes_back(database: Database) -> None:
    check_in(database, "w1", MINUTE)
    check_in(database, "w2", timedelta(hours=1))
    advance(database, MINUTE)

    assert check_in(database, "w1").workers == 2


def test_a_worker_that_went_silent_counts_no_longer(database: Database) -> None:
    check_in(database, "w1")
    check_in(database, "w2", timedelta(seconds=10))
    advance(database, timedelta(seconds=30))

    assert check_in(database, "w1").workers == 1


def test_a_worker_that_checked_out_counts_no_longer(database: Database) -> None:
    check_in(database, "w1")
    check_in(database, "w2")

    database.once(lambda conn: workers.check_out(conn, "w2"))

    assert check_in(database, "w1").workers == 1


def test_the_outlook_tells_how_soon_the_next_run_is_due(database: Database) -> None:
    make_run(database, state=RunState.WAITING)
    make_run(database)

    assert check_in(database).next_due == pytest.approx(RESEND.total_seconds(), abs=1)


def test_the_outlook_tells_for_how_long_a_run_is_overdue(database: Database) -> None:
    make_run(database)
    advance(database, MINUTE)

    assert check_in(database).next_due == pytest.approx(-55, abs=1)


def test_runs_that_are_over_are_not_waited_for(database: Database) -> None:
    make_run(database, state=RunState.SUCCEEDED)

    assert check_in(database).next_due is None
