"""No hot statement looks at finished runs: its plan and its cost stay the same with a million of them.

Costs are compared in pages that the server touched, which no busy machine changes.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from celery_durable.states import RunState
from celery_durable.store import queries, runs, schema, steps, workers
from celery_durable.store.database import Connection, Database
from celery_durable.store.runs import Due
from tests.factory import LEASE, PROCESS, RESEND, WORKER, Made, advance, make_record, make_run, new_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FINISHED = 200_000 if os.environ.get("DURABLE_SLOW") == "short" else 1_000_000
FEW = 1_000
LIVE = 2_000
BIG_TABLES = {"durable_run", "durable_step", "durable_message", "durable_outcome", "durable_history"}
#: An index over a thousand times as many rows is up to two levels deeper, and a statement descends into several.
DEEPER = 16
#: Statements about many runs descend for each of them; among a thousand rows they need not.
BATCH = 100
DEEPER_PER_RUN = 10
BATCHED = {"renew", "wake", "send_again", "envelopes"}

FILL = (
    "INSERT INTO durable_run (id, task, state, epoch, created_at, finished_at, worker, version) SELECT 'done-' || n,"
    " 'shop.order', 'succeeded', 1, now() - interval '1 day', now(), 'w1', 'v1'"
    " FROM generate_series(%(a)s::int, %(b)s::int) n",
    "INSERT INTO durable_message (run_id, envelope) SELECT 'done-' || n, '{}'"
    " FROM generate_series(%(a)s::int, %(b)s::int) n",
    "INSERT INTO durable_outcome (run_id, result) SELECT 'done-' || n, '1'"
    " FROM generate_series(%(a)s::int, %(b)s::int) n",
    "INSERT INTO durable_step (run_id, key, seq, name, kind, state, attempts, run_attempt, epoch, output, started_at)"
    " SELECT 'done-' || n, 'charge', 1, 'charge', 'step', 'succeeded', 1, 1, 1, '1', now()"
    " FROM generate_series(%(a)s::int, %(b)s::int) n",
    "INSERT INTO durable_history (run_id, what, epoch) SELECT 'done-' || n, 'claim', 1"
    " FROM generate_series(%(a)s::int, %(b)s::int) n",
)


def fill(database: Database, first: int, last: int) -> None:
    for statement in FILL:
        database.once(lambda conn, statement=statement: conn.exec_driver_sql(statement, {"a": first, "b": last}))
    tables = ", ".join([*sorted(BIG_TABLES), "durable_worker"])
    database.once(lambda conn: conn.exec_driver_sql(f"VACUUM ANALYZE {tables}"))


@dataclass
class Scene:
    """The live runs that the statements work on."""

    pending: list[Made]
    running: list[Made]
    waiting: list[Made]


def live(database: Database, count: int) -> Scene:
    states = (RunState.PENDING, RunState.RUNNING, RunState.WAITING)
    made = [[make_run(database, state=state) for _ in range(count // 3)] for state in states]
    return Scene(*made)


#: The hot statements, each as the function that sends it.
HOT: dict[str, Callable[[Connection, Scene], object]] = {
    "start": lambda conn, scene: runs.start(conn, new_run(), due_in=RESEND),
    "claim": lambda conn, scene: runs.claim(
        conn, scene.pending[0].id, worker=WORKER, process=PROCESS, lease=LEASE, version="v1"
    ),
    "claim of a run that may be unknown": lambda conn, scene: runs.claim_or_store(
        conn, scene.pending[1].new, worker=WORKER, process=PROCESS, lease=LEASE
    ),
    "claim of an unknown run": lambda conn, scene: runs.claim_or_store(
        conn, new_run(), worker=WORKER, process=PROCESS, lease=LEASE
    ),
    "append": lambda conn, scene: steps.append(conn, scene.running[0].id, make_record(), epoch=1, version="v1"),
    "load": lambda conn, scene: steps.load(conn, scene.running[0].id),
    "suspend": lambda conn, scene: runs.suspend(
        conn,
        scene.running[0].id,
        "suspend",
        epoch=1,
        who=WORKER,
        why="sleeps",
        version="v1",
        due_in=LEASE,
        record=make_record(),
    ),
    "finish": lambda conn, scene: runs.finish(
        conn, scene.running[0].id, "succeed", epoch=1, who=WORKER, lease=LEASE, result="1"
    ),
    "delivered": lambda conn, scene: runs.delivered(conn, [one.id for one in scene.running[:10]], worker=WORKER),
    "renew": lambda conn, scene: runs.renew(
        conn, {one.id: PROCESS for one in scene.running[:BATCH]}, worker=WORKER, lease=LEASE
    ),
    "due": lambda conn, scene: runs.due(conn, 100),
    "wake": lambda conn, scene: runs.wake(conn, [one.id for one in scene.waiting[:BATCH]], resend=RESEND),
    "send_again": lambda conn, scene: runs.send_again(conn, [one.id for one in scene.pending[:BATCH]], resend=RESEND),
    "recover": lambda conn, scene: runs.recover(
        conn, Due(scene.running[0].id, RunState.RUNNING, 1, 0, 0, 0, None), crashes=1, resend=RESEND
    ),
    "check_in": lambda conn, scene: workers.check_in(conn, WORKER, "celery@w1", seen_for=LEASE),
    "envelopes": lambda conn, scene: runs.envelopes(conn, [one.id for one in scene.pending[:BATCH]]),
    "get": lambda conn, scene: queries.get(conn, scene.running[0].id),
    "history_of": lambda conn, scene: queries.history_of(conn, scene.running[0].id),
}


class Spy:
    """Stands between psycopg and a statement, to see what is sent whichever way it is sent."""

    def __init__(self, conn: Connection) -> None:
        self.sent: list[tuple[str, Any]] = []
        self._driver: Any = conn.connection.driver_connection
        self._factory = self._driver.cursor_factory

    def __enter__(self) -> "Spy":
        sent, factory = self.sent, self._factory

        class Cursor(factory):  # type: ignore[misc, valid-type]
            def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
                sent.append((str(query), params))
                return super().execute(query, params, **options)

        self._driver.cursor_factory = Cursor
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.cursor_factory = self._factory


def plans_of(database: Database, scene: Scene, send: Callable[[Connection, Scene], object]) -> list[dict[str, Any]]:
    """Return the executed plan of every statement that `send` sends; nothing of it stays."""
    plans: list[dict[str, Any]] = []

    class Done(Exception):
        pass

    def explain(conn: Connection) -> None:
        driver: Any = conn.connection.driver_connection
        driver.execute("SAVEPOINT before")
        with Spy(conn) as spy:
            send(conn, scene)
        driver.execute("ROLLBACK TO SAVEPOINT before")
        assert spy.sent
        for statement, parameters in spy.sent:
            found = driver.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters).fetchone()[0]
            plans.append((found if isinstance(found, list) else json.loads(found))[0]["Plan"])
        raise Done

    with pytest.raises(Done):
        database.atomically(explain)
    return plans


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def pages(plans: list[dict[str, Any]]) -> int:
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)


@dataclass
class Stage:
    """A store with a million finished runs, and what the hot statements cost when there were few."""

    database: Database
    scene: Scene
    before: dict[str, int]


@pytest.fixture(scope="module")
def stage(postgres_url: str) -> Iterator[Stage]:
    migrating = Database(postgres_url)
    schema.migrate(migrating)
    migrating.close()
    database = Database(postgres_url)
    empty = "; ".join(f"TRUNCATE {table}" for table in [*sorted(BIG_TABLES), "durable_worker"])
    database.once(lambda conn: conn.exec_driver_sql(empty))
    scene = live(database, LIVE)
    advance(database, timedelta(minutes=30))
    fill(database, 1, FEW)
    before = {name: pages(plans_of(database, scene, send)) for name, send in HOT.items()}
    fill(database, FEW + 1, FINISHED)
    yield Stage(database, scene, before)
    database.once(lambda conn: conn.exec_driver_sql(empty))
    database.close()


each_statement = pytest.mark.parametrize("name", HOT)


@each_statement
def test_a_hot_statement_scans_no_big_table(stage: Stage, name: str) -> None:
    plans = plans_of(stage.database, stage.scene, HOT[name])

    scanned = [
        (node["Node Type"], node["Relation Name"])
        for plan in plans
        for node in nodes(plan)
        if node["Node Type"] in ("Seq Scan", "Bitmap Heap Scan") and node.get("Relation Name") in BIG_TABLES
        if node["Node Type"] == "Seq Scan" or node["Actual Rows"] > LIVE
    ]
    assert scanned == []


@each_statement
def test_a_hot_statement_touches_as_many_pages_as_with_a_thousand_runs(stage: Stage, name: str) -> None:
    after = pages(plans_of(stage.database, stage.scene, HOT[name]))

    allowed = DEEPER + (DEEPER_PER_RUN * BATCH if name in BATCHED else 0)
    assert after <= 1.2 * stage.before[name] + allowed, f"{stage.before[name]} pages before, {after} after"


def test_there_are_as_many_finished_runs_as_announced(stage: Stage) -> None:
    count = sa.text("SELECT count(*) FROM durable_run WHERE state = 'succeeded'")

    assert stage.database.once(lambda conn: conn.execute(count).scalar()) == FINISHED
