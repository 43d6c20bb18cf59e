"""Starting a run and waiting for it, with a real worker inside this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from celery_durable import Abort, ConflictError, Durable, DurableTask, RetryPolicy, sleep
from celery_durable.messages import dispatch


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app without a result backend; its messages stay in memory, its runs in SQLite."""
    made = Celery("starts", broker="memory://", set_as_current=False)
    made.conf.task_default_queue = tmp_path.name  # all of a process share one memory
    store = f"sqlite:///{tmp_path / 'store.db'}"
    durable = Durable(made, store_url=store, retry=RetryPolicy.none(), inline_delay=0, sweep_interval=0.2)
    durable.migrate()
    yield made
    durable.runtime.database.close()
    made.close()


@pytest.fixture
def doubled(app: Celery) -> Any:
    @app.task(base=DurableTask, shared=False, name="starts.doubled")
    def doubled(number: int) -> int:
        if number < 0:
            raise Abort("no negative numbers")
        return 2 * number

    return doubled


def test_the_same_key_gives_the_same_run(app: Celery, doubled: Any) -> None:
    first = doubled.apply_async((4,), idempotency_key="order-4")
    again = doubled.apply_async((4,), idempotency_key="order-4")

    assert again.id == first.id
    assert [run.id for run in app.durable.runs.list()] == [first.id]


def test_the_same_key_with_another_input_is_refused(app: Celery, doubled: Any) -> None:
    first = doubled.apply_async((4,), idempotency_key="order-4")

    with pytest.raises(ConflictError, match=f"'order-4' was used for another input, by run {first.id}"):
        doubled.apply_async((5,), idempotency_key="order-4")

    assert len(app.durable.runs.list()) == 1


def test_the_same_key_for_another_task_is_refused(app: Celery, doubled: Any) -> None:
    @app.task(base=DurableTask, shared=False, name="starts.other")
    def other(number: int) -> int:
        return number

    doubled.apply_async((4,), idempotency_key="order-4")

    with pytest.raises(ConflictError, match=r"was used for the task starts\.doubled"):
        other.apply_async((4,), idempotency_key="order-4")


def test_a_repeated_start_returns_the_result_of_the_first(app: Celery, doubled: Any) -> None:
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        first = doubled.apply_async((4,), idempotency_key="order-4").get(timeout=20, interval=0.02)
        again = doubled.apply_async((4,), idempotency_key="order-4").get(timeout=20, interval=0.02)

    assert (first, again) == (8, 8)


def test_a_result_is_waited_for_without_a_result_backend(app: Celery, doubled: Any) -> None:
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        assert doubled.delay(21).get(timeout=20, interval=0.02) == 42


def test_a_failure_is_raised_without_a_result_backend(app: Celery, doubled: Any) -> None:
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        handle = doubled.delay(-1)

        with pytest.raises(Abort, match="no negative numbers"):
            handle.get(timeout=20, interval=0.02)
        assert isinstance(handle.get(timeout=20, interval=0.02, propagate=False), Abort)


def test_waiting_without_a_result_backend_ends_at_its_timeout(doubled: Any) -> None:
    with pytest.raises(TimeoutError, match="is pending"):
        doubled.delay(1).get(timeout=0.1, interval=0.02)


def test_a_run_that_a_body_starts_is_started_once_however_often_the_body_is_executed(app: Celery, doubled: Any) -> None:
    @app.task(base=DurableTask, shared=False, name="starts.parent")
    def parent() -> list[str]:
        first = doubled.delay(1)
        sleep(0.05)
        second = doubled.apply_async((2,), tags=["second"])
        sleep(0.05)
        return [first.id, second.id]

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        handle = parent.delay()
        ids = handle.get(timeout=20, interval=0.02)

    children = [run for run in app.durable.runs.list() if run.task == "starts.doubled"]
    assert sorted(run.id for run in children) == sorted(ids)
    assert [record.key for record in handle.steps] == ["starts.doubled", "sleep", "starts.doubled#2", "sleep#2"]
    assert len([move for move in handle.history if move.what == "claim"]) == 3


def test_a_child_whose_record_was_lost_is_not_started_again(app: Celery, doubled: Any) -> None:
    @app.task(base=DurableTask, shared=False, name="starts.parent")
    def parent() -> str:
        return str(doubled.delay(1).id)

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        handle = parent.delay()
        first = handle.get(timeout=20, interval=0.02)
    database = app.durable.runtime.database
    for statement in (
        "DELETE FROM durable_step",
        "UPDATE durable_run SET state = 'pending' WHERE task = 'starts.parent'",
    ):
        database.once(lambda conn, statement=statement: conn.exec_driver_sql(statement))
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        dispatch.send_stored(app, app.durable.runtime, [handle.id])
        again = handle.get(timeout=20, interval=0.02)

    assert again == first
    assert len(app.durable.runs.list()) == 2
