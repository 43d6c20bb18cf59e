"""How many statements each operation costs, counted by the PostgreSQL server that received them."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from celery_durable import Durable, DurableTask, RetryPolicy, sleep, step
from celery_durable.engine.context import Context, Rules, activated
from celery_durable.engine.outcome import Suspend
from celery_durable.errors import RunCancelled
from celery_durable.states import RunState
from celery_durable.store import runs, schema, workers
from celery_durable.store.database import Database
from celery_durable.worker.bootstep import KeeperThread
from tests.factory import LEASE, Made, advance, finish, make_record, make_run, new_run, suspend, take
from tests.servers import StatementLog

APPLICATION = "celery-durable"
#: What only PostgreSQL's housekeeping would say; there is none in autocommit.
NEVER = ("BEGIN", "COMMIT", "ROLLBACK", "SELECT 1", "SET ", "SHOW", "DEALLOCATE", "DISCARD")


@dataclass
class Counter:
    """Counts what the server was sent by this package since the last look."""

    log: StatementLog
    since: int = 0

    def reset(self) -> None:
        self.since = self.log.mark()

    def statements(self) -> list[str]:
        return self.log.statements(APPLICATION, since=self.since)

    def assert_sent(self, count: int, *, beside: Callable[[str], bool] = lambda statement: False) -> None:
        """Check that so many statements were sent, and no other but those that `beside` names."""
        sent = self.statements()
        assert not [statement for statement in sent if statement.strip().upper().startswith(NEVER)], sent
        counted = [statement for statement in sent if not beside(statement)]
        assert len(counted) == count, counted


@pytest.fixture
def store(fresh_postgres_url: str, postgres_log: StatementLog) -> Iterator[Database]:
    """A store whose connection is open, so that opening it is not counted."""
    migrating = Database(fresh_postgres_url)
    schema.migrate(migrating)
    migrating.close()
    database = Database(fresh_postgres_url)
    make_run(database, state=RunState.SUCCEEDED)
    yield database
    database.close()


@pytest.fixture
def counter(store: Database, postgres_log: StatementLog) -> Counter:
    return Counter(postgres_log)


def context_of(store: Database, made: Made, *, records: int = 0) -> Context:
    claim = store.once(lambda conn: runs.claim_or_store(conn, made.new, worker="w1", process=1, lease=LEASE))
    assert claim is not None
    assert len(claim.records) == records
    rules = Rules(
        retry=RetryPolicy.none(),
        inline_delay=timedelta(seconds=1),
        max_payload=1000,
        on_divergence="fail",
        version="v1",
        worker="w1",
    )
    return Context(store, made.id, "shop.order", claim, rules)


@step
def charge(cents: int) -> int:
    return cents


def test_a_start_costs_one_statement(store: Database, counter: Counter) -> None:
    new = new_run()
    counter.reset()

    store.once(lambda conn: runs.start(conn, new, due_in=LEASE))

    counter.assert_sent(1)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_claim_costs_one_statement_also_where_no_row_exists_yet(
    store: Database, counter: Counter, is_known: bool
) -> None:
    made = make_run(store) if is_known else Made("unknown", 0, new_run("unknown"))
    counter.reset()

    assert take(store, made) is not None

    counter.assert_sent(1)


def test_a_claim_that_reads_a_hundred_records_costs_one_statement(store: Database, counter: Counter) -> None:
    records = [make_record(f"charge#{n}", seq=n) for n in range(2, 102)]
    made = make_run(store, state=RunState.RUNNING, records=records)
    suspend(store, made, "release", due_in=LEASE)
    counter.reset()

    claim = take(store, made)

    assert claim is not None
    assert len(claim.records) == 100
    counter.assert_sent(1)


def test_a_stale_message_costs_one_statement(store: Database, counter: Counter) -> None:
    made = make_run(store, state=RunState.SUCCEEDED)
    counter.reset()

    assert take(store, made) is None

    counter.assert_sent(1)


def test_a_new_step_costs_one_statement_and_a_replayed_one_none(store: Database, counter: Counter) -> None:
    made = make_run(store)
    context = context_of(store, made)
    counter.reset()

    with activated(context):
        assert [charge(n) for n in range(10)] == list(range(10))

    counter.assert_sent(10)
    suspend(store, Made(made.id, context.epoch, made.new), "release", due_in=LEASE)
    again = context_of(store, made, records=10)
    counter.reset()
    with activated(again):
        assert [charge(n) for n in range(10)] == list(range(10))
    counter.assert_sent(0)


def test_a_cancel_is_noticed_without_asking(store: Database, counter: Counter) -> None:
    made = make_run(store)
    context = context_of(store, made)
    store.once(lambda conn: runs.cancel(conn, made.id, who="ann", why="no", resend=LEASE))
    counter.reset()

    with activated(context), pytest.raises(RunCancelled):
        for n in range(3):
            charge(n)

    counter.assert_sent(1)


def test_a_sleep_costs_nothing_until_it_is_committed_with_the_suspension(store: Database, counter: Counter) -> None:
    made = make_run(store)
    context = context_of(store, made)
    counter.reset()

    with activated(context), pytest.raises(Suspend):
        sleep(3600)
    counter.assert_sent(0)

    record = getattr(context.ended, "record", None)
    suspend(store, Made(made.id, context.epoch, made.new), due_in=timedelta(hours=1), record=record)
    counter.assert_sent(1)


def test_a_finish_costs_two_statements(store: Database, counter: Counter) -> None:
    made = make_run(store, state=RunState.RUNNING)
    counter.reset()

    finish(store, made)
    store.once(lambda conn: runs.delivered(conn, [made.id], worker="w1"))

    counter.assert_sent(2)


def test_a_hundred_leases_are_renewed_by_one_statement(store: Database, counter: Counter) -> None:
    held = {make_run(store, state=RunState.RUNNING).id: 4711 for _ in range(100)}
    counter.reset()

    store.once(lambda conn: runs.renew(conn, held, worker="w1", lease=LEASE))

    counter.assert_sent(1)


def test_a_check_in_costs_one_statement(store: Database, counter: Counter) -> None:
    counter.reset()

    store.once(lambda conn: workers.check_in(conn, "w1", "celery@w1", seen_for=LEASE))

    counter.assert_sent(1)


# -- through Celery ---------------------------------------------------------------------------------


@pytest.fixture
def app(store: Database) -> Iterator[Celery]:
    made = Celery("budgets", broker="memory://budgets", backend="cache+memory://", set_as_current=False)
    made.conf.update(worker_hijack_root_logger=False, task_default_queue=f"budgets-{id(made)}")
    Durable(made, store_url=store.url.render_as_string(hide_password=False), sweep_interval=3600, lease=3600)
    yield made
    made.durable.runtime.database.close()
    made.close()


def task_of(app: Celery, steps: int = 0, nap: float = 0) -> Any:
    @app.task(base=DurableTask, shared=False, name=f"budgets.{steps}.{nap}")
    def body() -> int:
        for n in range(steps):
            charge(n)
        if nap:
            sleep(nap)
        return steps

    return body


def is_check_in(statement: str) -> bool:
    return "durable_worker" in statement


def test_apply_async_costs_one_statement(app: Celery, counter: Counter) -> None:
    task = task_of(app)
    task.apply_async()
    counter.reset()

    for _ in range(5):
        task.apply_async()

    counter.assert_sent(5)


def test_a_run_costs_a_start_a_claim_its_steps_and_a_finish(app: Celery, counter: Counter) -> None:
    tasks = {steps: task_of(app, steps) for steps in (0, 3)}
    counter.reset()
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        tasks[0].apply_async().get(timeout=20)  # opens the connections
        wait_until_delivered(counter)
        for steps, task in tasks.items():
            counter.reset()

            assert task.apply_async().get(timeout=20) == steps
            wait_until_delivered(counter)

            counter.assert_sent(1 + 1 + steps + 2, beside=is_check_in)


def test_a_worker_inside_this_process_leaves_no_thread_behind(app: Celery) -> None:
    before = {thread.ident for thread in threading.enumerate() if thread.name == "durable-keeper"}

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        pass

    left = [thread for thread in threading.enumerate() if thread.name == "durable-keeper"]
    assert [thread for thread in left if thread.ident not in before] == []


def wait_until_delivered(counter: Counter) -> None:
    """Wait by reading the server's log, because asking the store would count."""
    for _ in range(400):
        if any("SET due_at=$1" in statement for statement in counter.statements()):
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"not delivered: {counter.statements()}")


# -- an idle worker ---------------------------------------------------------------------------------


@pytest.fixture
def keeper(app: Celery) -> Iterator[KeeperThread]:
    """The keeper of an idle worker, which the test drives itself."""
    app.durable.runtime.worker = "idle"
    made = KeeperThread(app, app.durable.runtime, "celery@idle")
    made._pass()
    yield made


def test_a_pass_of_an_idle_worker_costs_one_statement(keeper: KeeperThread, counter: Counter) -> None:
    counter.reset()

    keeper._carry_out_notes()
    keeper._look_after_processes()
    keeper._renew()
    keeper._pass()

    counter.assert_sent(1)


def test_an_idle_worker_waits_a_sweep_interval_for_each_worker_that_shares_the_store(
    keeper: KeeperThread, store: Database
) -> None:
    interval = keeper._interval
    for n in range(1, 4):
        store.once(lambda conn, n=n: workers.check_in(conn, f"other{n}", "x", seen_for=timedelta(days=1)))
        keeper._pass()

        assert keeper._next_pass - time.monotonic() >= interval * (n + 1) * 0.9 - 1


def test_runs_that_sleep_cost_an_idle_worker_nothing(keeper: KeeperThread, store: Database, counter: Counter) -> None:
    for _ in range(20):
        make_run(store, state=RunState.WAITING)
    counter.reset()

    keeper._pass()

    counter.assert_sent(1)


def test_waking_a_hundred_runs_costs_as_many_statements_as_waking_one(
    keeper: KeeperThread, store: Database, counter: Counter, app: Celery
) -> None:
    task = task_of(app, nap=5)
    sent: list[int] = []
    for count in (1, 100):
        made = [task.apply_async(countdown=30) for _ in range(count)]
        advance(store, timedelta(minutes=1))
        counter.reset()
        keeper._pass()
        sent.append(len(counter.statements()))
        assert {store.once(lambda conn, one=one: runs.envelopes(conn, [one.id]))[one.id].attempt for one in made} == {1}

    assert sent == [4, 4], "check in, due, wake, envelopes"
