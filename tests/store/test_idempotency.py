"""A start under an idempotency key happens once."""

import threading
from datetime import timedelta

from celery_durable.store import queries, runs
from celery_durable.store.database import Database
from celery_durable.store.runs import Known, NewRun
from tests.factory import RESEND, advance, new_run

TTL = timedelta(days=30)


def start_once(database: Database, new: NewRun, fingerprint: str = "f", ttl: timedelta = TTL) -> Known | None:
    return database.once(lambda conn: runs.start_once(conn, new, fingerprint=fingerprint, ttl=ttl, due_in=RESEND))


def test_the_first_start_under_a_key_stores_the_run_and_its_message(database: Database) -> None:
    new = new_run(idempotency_key="order-1")

    assert start_once(database, new) is None

    found = database.once(lambda conn: queries.get(conn, new.id))
    assert found is not None
    assert (found.id, found.idempotency_key, found.state) == (new.id, "order-1", "pending")


def test_a_second_start_under_a_key_stores_nothing_and_names_the_first(database: Database) -> None:
    first, second = new_run(idempotency_key="order-1"), new_run(idempotency_key="order-1")
    start_once(database, first, "one")

    assert start_once(database, second, "two") == Known(first.id, first.task, "one")
    assert database.once(lambda conn: queries.get(conn, second.id)) is None


def test_a_key_is_free_again_when_its_time_is_over(database: Database) -> None:
    first, second = new_run(idempotency_key="order-1"), new_run(idempotency_key="order-1")
    start_once(database, first, ttl=timedelta(hours=1))
    advance(database, timedelta(hours=2))

    assert start_once(database, second) is None


def test_of_many_starts_at_once_under_a_key_one_is_stored(database: Database) -> None:
    made = [new_run(idempotency_key="order-1") for _ in range(8)]
    answers: list[Known | None] = []

    def start(new: NewRun) -> None:
        answers.append(start_once(database, new))

    threads = [threading.Thread(target=start, args=(new,)) for new in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    stored = [new.id for new in made if database.once(lambda conn, new=new: queries.get(conn, new.id))]
    assert answers.count(None) == 1
    assert [known.run_id for known in answers if known is not None] == stored * 7


def test_a_key_that_is_over_is_deleted_with_old_runs(database: Database) -> None:
    start_once(database, new_run(idempotency_key="order-1"), ttl=timedelta(hours=1))
    advance(database, timedelta(hours=2))

    database.atomically(lambda conn: runs.prune(conn, keep=timedelta(days=30), most=10))

    with database.engine.connect() as conn:
        assert conn.exec_driver_sql("SELECT count(*) FROM durable_idempotency").scalar() == 0
