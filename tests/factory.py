"""Makes stored runs in any state, by the moves that lead there, and moves their time.

The store's clock is the database's, so time passes by shifting every stored instant back.
"""

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from celery_durable.states import RunState, StepState
from celery_durable.store import runs, steps
from celery_durable.store.database import Database
from celery_durable.store.expressions import Instant
from celery_durable.store.runs import Claim, NewRun
from celery_durable.store.steps import Record
from celery_durable.store.tables import history, metadata, run

LEASE = timedelta(seconds=15)
RESEND = timedelta(seconds=5)
WORKER = "w1"
PROCESS = 4711
ERROR = '{"type": "builtins:KeyError", "message": "gone", "args": ["gone"], "attributes": {}, "traceback": ""}'

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Made:
    """A stored run: its id, the epoch it is at, and what it was started with."""

    id: str
    epoch: int
    new: NewRun


def new_run(run_id: str | None = None, **values: Any) -> NewRun:
    """Return what a run is at its start; each has its own id."""
    defaults = {"task": "shop.order", "envelope": '{"body": "[]"}', "queue": "celery", "version": "v1"}
    return NewRun(id=run_id or f"run-{next(_numbers)}-{uuid.uuid4().hex[:6]}", **(defaults | values))


def make_record(key: str = "charge", **values: Any) -> Record:
    """Return the record of a step that succeeded, unless `values` say otherwise."""
    defaults = {"seq": 1, "name": key.partition("#")[0], "kind": "step", "state": StepState.SUCCEEDED, "output": "1"}
    return Record(key=key, **(defaults | values))


def make_run(
    database: Database,
    *,
    state: RunState = RunState.PENDING,
    is_delivered: bool = True,
    worker: str = WORKER,
    records: Sequence[Record] = (),
    **values: Any,
) -> Made:
    """Store a run and move it to `state`.

    Args:
        is_delivered: whether Celery knows of the outcome of an ended run.
        worker: who holds the run or held it last.
        records: what it has recorded; for states after `running`.
    """
    new = new_run(**values)
    is_delayed = state is RunState.DELAYED
    due_in = timedelta(hours=1) if is_delayed else RESEND
    database.once(lambda conn: runs.start(conn, new, due_in=due_in, delayed=is_delayed))
    made = Made(new.id, 0, new)
    match state:
        case RunState.PENDING | RunState.DELAYED:
            return made
        case RunState.QUEUED:
            by_hand = sa.update(run).where(run.c.id == new.id).values(state="queued")  # no move leads there yet
            database.once(lambda conn: conn.execute(by_hand))
            return made
        case RunState.EXPIRED:
            database.once(lambda conn: runs.discard(conn, new.id, who=worker, expired=True))
            return made
    claim = take(database, made, worker=worker)
    assert claim is not None
    made = replace(made, epoch=claim.epoch)
    for record in records:
        assert append(database, made, record) is False
    if state in (RunState.WAITING, RunState.RETRYING):
        move = "suspend" if state is RunState.WAITING else "back_off"
        assert suspend(database, made, move, due_in=timedelta(hours=1))
    elif state is not RunState.RUNNING:
        move = {"succeeded": "succeed", "failed": "fail", "cancelled": "cancel"}[state]
        assert finish(database, made, move, worker=worker)
        if is_delivered:
            database.once(lambda conn: runs.delivered(conn, [made.id], worker=worker))
    return made


def take(database: Database, made: Made, *, worker: str = WORKER) -> Claim | None:
    """Claim a run for `worker`."""
    return database.once(lambda conn: runs.claim_or_store(conn, made.new, worker=worker, process=PROCESS, lease=LEASE))


def append(database: Database, made: Made, record: Record) -> bool | None:
    """Append a record as the owner at the epoch of `made`."""
    return database.once(lambda conn: steps.append(conn, made.id, record, epoch=made.epoch, version="v1"))


def suspend(database: Database, made: Made, move: str = "suspend", **values: Any) -> bool:
    """Suspend a run as the owner at the epoch of `made`."""
    given = {"epoch": made.epoch, "who": WORKER, "why": "it waits", "version": "v1"} | values
    return database.once(lambda conn: runs.suspend(conn, made.id, move, **given))


def finish(database: Database, made: Made, move: str = "succeed", *, worker: str = WORKER) -> bool:
    """Record an outcome as the owner at the epoch of `made`."""
    given: dict[str, Any] = {
        "succeed": {"result": "42"},
        "fail": {"error": ERROR, "error_code": "exception", "why": "KeyError: gone"},
        "cancel": {"error": ERROR, "why": "it was cancelled"},
    }[move]
    return database.once(
        lambda conn: runs.finish(conn, made.id, move, epoch=made.epoch, who=worker, lease=LEASE, **given)
    )


def row_of(database: Database, made: Made) -> Any:
    """Return the row of a run as it is stored, or None."""
    return database.once(lambda conn: conn.execute(sa.select(run).where(run.c.id == made.id)).first())


def state_of(database: Database, made: Made) -> RunState:
    """Return the stored state of a run."""
    return RunState(row_of(database, made).state)


def notes_of(database: Database, made: Made) -> list[tuple[str, str | None, str | None, int]]:
    """Return what, who, why and epoch of every history row of a run, in order."""
    columns = (history.c.what, history.c.who, history.c.why, history.c.epoch)
    chosen = sa.select(*columns).where(history.c.run_id == made.id).order_by(history.c.id)
    return database.once(lambda conn: [tuple(row) for row in conn.execute(chosen)])


def advance(database: Database, by: timedelta) -> None:
    """Let time pass: shift every stored instant back."""

    def shift(conn: sa.Connection) -> None:
        for table in metadata.sorted_tables:
            instants = [column for column in table.c if isinstance(column.type, Instant)]
            if instants:
                conn.execute(sa.update(table).values({column.name: _earlier(conn, column, by) for column in instants}))

    database.once(shift)


def _earlier(conn: sa.Connection, column: Any, by: timedelta) -> Any:
    if conn.dialect.name == "sqlite":
        shifted = sa.func.strftime("%Y-%m-%d %H:%M:%f000", column, f"{-by.total_seconds():+.3f} seconds")
        return sa.type_coerce(shifted, Instant)
    return column - sa.literal(by, sa.Interval)
