"""Every move of a run.

A move is one guarded statement: it names the states it may leave and, for the owner of a run, the
epoch under which it holds it. A statement that moved nothing is a refusal and says so. `due_at` is set
by each move to the moment at which the sweeper must look at the run next, and is null when never.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import FromClause

from celery_durable.states import MOVES, TERMINAL, RunState
from celery_durable.store import steps
from celery_durable.store.expressions import Instant, now
from celery_durable.store.statements import Together, bind, given, per_dialect
from celery_durable.store.steps import Record
from celery_durable.store.tables import history, message, outcome, run, step

_MOST_DOUBLINGS = 6


def _later(name: str) -> now:
    return now(bind(name, sa.Float))


_RUN_ID = bind("run_id")
_EPOCH = bind("epoch", sa.Integer)
_DUE = sa.func.coalesce(bind("due_at", Instant), _later("due_in"), type_=Instant)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What a run is at its start."""

    id: str
    task: str
    envelope: str
    queue: str | None = None
    version: str | None = None
    group_id: str | None = None
    parent_id: str | None = None
    root_id: str | None = None
    tags: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A run as its new owner finds it; one in a terminal state is claimed to deliver its outcome."""

    epoch: int
    state: RunState
    attempt: int
    first_attempt: int
    cancel_requested: bool
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Due:
    """A run that the sweeper must look at; `records` is counted for running ones only."""

    id: str
    state: RunState
    epoch: int
    crashes: int
    crash_mark: int
    records: int
    queue: str | None
    sends: int = 0


# -- start and claim ---------------------------------------------------------------------------------


def start(
    conn: Connection, new: NewRun, *, due_in: timedelta, due_at: datetime | None = None, delayed: bool = False
) -> bool:
    """Store a run and its message; return whether it is new.

    Args:
        due_in: when the message counts as lost, or when a delayed run starts.
        due_at: the same as an instant; it wins over `due_in`.
        delayed: whether the run waits for that time.
    """
    parameters = _values_of(new) | {
        "state": RunState.DELAYED if delayed else RunState.PENDING,
        "due_in": due_in.total_seconds(),
        "due_at": due_at,
    }
    return bool(_start(conn)(conn, parameters))


@per_dialect
def _start(insert: Any) -> Together:
    first = insert(run).values(
        id=_RUN_ID, task=bind("task"), state=bind("state"), due_at=_DUE, queue=bind("queue"), version=bind("version")
    )
    return Together(
        first.on_conflict_do_nothing(index_elements=[run.c.id]).returning(run.c.id),
        [_keep_message(insert, first_only=False)],
    )


def claim(conn: Connection, new: NewRun, *, worker: str, process: int, lease: timedelta) -> Claim | None:
    """Take a run whose message has come, storing it first where its producer did not; one statement.

    Returns:
        The run with all its records, or None when the message is stale: the run is not pending.
    """
    parameters = _values_of(new) | {"worker": worker, "process": process, "lease": lease.total_seconds()}
    rows = _claim(conn)(conn, parameters)
    if not rows:
        return None
    row = rows[0]
    # The records were read by the statement's snapshot. When the row had moved on since that snapshot was
    # taken, a record committed in between may be missing from it.
    is_current = row.epoch == 1 or (row.seen_epoch == row.epoch - 1 and row.seen_state != RunState.RUNNING)
    records = steps.from_json(row.records) if is_current else steps.load(conn, new.id)
    return Claim(row.epoch, RunState(row.state), row.attempt, row.first_attempt, bool(row.cancel_requested), records)


@per_dialect
def _claim(insert: Any) -> Together:
    is_ready = sa.and_(
        run.c.state.in_(MOVES["claim"].sources), sa.or_(run.c.state != RunState.DELAYED, run.c.due_at <= now())
    )
    is_undelivered = sa.and_(run.c.state.in_(TERMINAL), run.c.due_at.is_not(None), run.c.worker.is_(None))
    seen = run.alias("seen")
    inserted = insert(run).values(
        id=_RUN_ID,
        task=bind("task"),
        state=RunState.RUNNING,
        epoch=1,
        due_at=_later("lease"),
        worker=bind("worker"),
        process=bind("process", sa.Integer),
        queue=bind("queue"),
        version=bind("version"),
        started_at=now(),
    )
    excluded = inserted.excluded
    claimed = inserted.on_conflict_do_update(
        index_elements=[run.c.id],
        set_={
            "state": sa.case((is_ready, RunState.RUNNING), else_=run.c.state),
            "epoch": run.c.epoch + 1,
            "due_at": excluded.due_at,
            "worker": excluded.worker,
            "process": excluded.process,
            "version": sa.case((is_ready, excluded.version), else_=run.c.version),
            "started_at": sa.func.coalesce(run.c.started_at, excluded.started_at),
            "sends": 0,
            "wait": None,
        },
        where=sa.or_(is_ready, is_undelivered),
    ).returning(
        run.c.id,
        run.c.epoch,
        run.c.state,
        run.c.attempt,
        run.c.first_attempt,
        run.c.cancel_requested,
        sa.select(seen.c.epoch).where(seen.c.id == _RUN_ID).scalar_subquery().label("seen_epoch"),
        sa.select(seen.c.state).where(seen.c.id == _RUN_ID).scalar_subquery().label("seen_state"),
        steps.all_as_json().label("records"),
    )
    note = _note("claim", who=bind("worker"), version=bind("version"))
    return Together(claimed, [_keep_message(insert, first_only=True), note])


def _keep_message(insert: Any, *, first_only: bool) -> Callable[[FromClause], UpdateBase]:
    def make(moved: FromClause) -> UpdateBase:
        columns = {name: bind(name) for name in ("envelope", "group_id", "parent_id", "root_id", "tags")}
        source = sa.select(moved.c.id, *columns.values()).where(moved.c.epoch == 1 if first_only else sa.true())
        statement: UpdateBase = insert(message).from_select(["run_id", *columns], source)
        return statement.on_conflict_do_nothing(index_elements=[message.c.run_id])  # type: ignore[attr-defined,no-any-return]

    return make


def _values_of(new: NewRun) -> dict[str, Any]:
    return {
        "run_id": new.id,
        "task": new.task,
        "envelope": new.envelope,
        "queue": new.queue,
        "version": new.version,
        "group_id": new.group_id,
        "parent_id": new.parent_id,
        "root_id": new.root_id,
        "tags": new.tags,
    }


# -- moves of the owner ------------------------------------------------------------------------------


def suspend(
    conn: Connection,
    run_id: str,
    move: str,
    *,
    epoch: int,
    who: str,
    why: str,
    version: str,
    due_in: timedelta | None = None,
    due_at: datetime | None = None,
    record: Record | None = None,
    next_attempt: bool = False,
) -> bool:
    """Give up a running run until its time, by the move suspend, back_off or release.

    Args:
        next_attempt: whether an attempt of the run itself has failed.
        due_in: how long from now; `due_at`, an instant, wins over it; with neither nothing wakes it but a move.
        record: what to record with the move.

    Returns:
        Whether the run was moved; not when it is no longer held under `epoch`.
    """
    parameters = {
        "run_id": run_id,
        "epoch": epoch,
        "who": who,
        "why": why,
        "due_in": None if due_in is None else due_in.total_seconds(),
        "due_at": due_at,
    }
    if record is not None:
        parameters |= steps.values(record, version)
    return bool(_suspend(conn, move, record is not None, next_attempt)(conn, parameters))


@per_dialect
def _suspend(insert: Any, move: str, with_record: bool, next_attempt: bool) -> Together:
    more = {"attempt": run.c.attempt + 1} if next_attempt else {}
    # A cancel that was asked for since the last record must not wait for the end of this wait.
    due_at = sa.case((run.c.cancel_requested, now()), else_=_DUE)
    moved = _owned(move, due_at=due_at, wait=bind("why"), worker=None, process=None, **more)
    then = [_note(move, why=bind("why"))]
    if with_record:
        then.append(steps.dependent(insert, _EPOCH))
    return Together(moved, then)


def finish(
    conn: Connection,
    run_id: str,
    move: str,
    *,
    epoch: int,
    who: str,
    lease: timedelta,
    result: str | None = None,
    error: str | None = None,
    error_code: str | None = None,
    why: str | None = None,
) -> bool:
    """Record the outcome of a running run by the move succeed, fail or cancel; it is not delivered yet.

    Returns:
        Whether the run was moved, or had been by the same owner before.
    """
    parameters = {
        "run_id": run_id,
        "epoch": epoch,
        "who": who,
        "why": why,
        "due_in": lease.total_seconds(),
        "due_at": None,
        "result": result,
        "error": error,
        "error_code": error_code,
    }
    if _finish(conn, move)(conn, parameters):
        return True
    # Either the run is lost, or this is a repetition after a lost connection.
    mine = sa.select(run.c.id).where(run.c.id == run_id, run.c.epoch == epoch, run.c.state == MOVES[move].target)
    return conn.execute(mine).first() is not None


@per_dialect
def _finish(insert: Any, move: str) -> Together:
    moved = _owned(move, due_at=_DUE, error_code=bind("error_code"), finished_at=now(), wait=None)
    return Together(moved, [_note(move, why=bind("why")), _keep_outcome(insert)])


def _keep_outcome(insert: Any) -> Callable[[FromClause], UpdateBase]:
    def make(moved: FromClause) -> UpdateBase:
        source = sa.select(moved.c.id, bind("result"), bind("error")).where(sa.true())
        statement = insert(outcome).from_select(["run_id", "result", "error"], source)
        excluded = statement.excluded
        kept: UpdateBase = statement.on_conflict_do_update(
            index_elements=[outcome.c.run_id], set_={"result": excluded.result, "error": excluded.error}
        )
        return kept

    return make


def delivered(conn: Connection, run_ids: Iterable[str], *, worker: str) -> None:
    """Note that Celery has stored these outcomes and sent their callbacks."""
    conn.execute(_DELIVERED, given({"ids": list(run_ids), "worker": worker}))


_DELIVERED = (
    sa.update(run)
    .where(
        run.c.id.in_(bind("ids", expanding=True)),
        run.c.worker == bind("worker"),
        run.c.state.in_(TERMINAL),
    )
    .values(due_at=None)
)


def outcome_of(conn: Connection, run_id: str) -> tuple[str | None, str | None]:
    """Return the stored result and error of a run."""
    row = conn.execute(sa.select(outcome.c.result, outcome.c.error).where(outcome.c.run_id == run_id)).first()
    return (row.result, row.error) if row is not None else (None, None)


def is_held(conn: Connection, run_id: str, epoch: int) -> bool:
    """Return whether the run still runs under `epoch`."""
    held = sa.select(run.c.id).where(run.c.id == run_id, run.c.epoch == epoch, run.c.state == RunState.RUNNING)
    return conn.execute(held).first() is not None


# -- leases ------------------------------------------------------------------------------------------


def renew(conn: Connection, held: Mapping[str, int], *, worker: str, lease: timedelta) -> None:
    """Prolong the leases of the runs that a worker is active on.

    Args:
        held: the process that executes each of them; a run that another process claimed is not renewed.
    """
    parameters = {"held": list(held.items()), "worker": worker, "lease": lease.total_seconds()}
    conn.execute(_RENEW, given(parameters))


_RENEW = (
    sa.update(run)
    .where(
        sa.tuple_(run.c.id, run.c.process).in_(bind("held", None, expanding=True)),
        run.c.worker == bind("worker"),
        run.c.due_at.is_not(None),
    )
    .values(due_at=_later("lease"))
)


def expire_lease(conn: Connection, run_id: str, *, worker: str, process: int) -> None:
    """End the lease of a run whose pool process is dead."""
    dead = sa.update(run).where(
        run.c.id == run_id, run.c.worker == worker, run.c.process == process, run.c.due_at.is_not(None)
    )
    conn.execute(dead.values(due_at=now()))


# -- moves of the sweeper ----------------------------------------------------------------------------


def due(conn: Connection, limit: int) -> list[Due]:
    """Return the runs whose time has come, the longest overdue first."""
    return [Due(*row[:1], RunState(row[1]), *row[2:]) for row in conn.execute(_SELECT_DUE, given({"most": limit}))]


_SELECT_DUE = (
    sa.select(
        run.c.id,
        run.c.state,
        run.c.epoch,
        run.c.crashes,
        run.c.crash_mark,
        sa.case(
            (
                run.c.state == RunState.RUNNING,
                sa.select(sa.func.count()).where(step.c.run_id == run.c.id).scalar_subquery(),
            ),
            else_=0,
        ),
        run.c.queue,
        run.c.sends,
    )
    .where(run.c.due_at <= now())
    .order_by(run.c.due_at)
    .limit(bind("most", sa.Integer))
)


def wake(conn: Connection, run_ids: Sequence[str], *, resend: timedelta) -> list[str]:
    """Make suspended runs whose time has come pending; return those that were moved."""
    return _ids(_WAKE(conn, {"ids": list(run_ids), "resend": resend.total_seconds()}))


def send_again(conn: Connection, run_ids: Sequence[str], *, resend: timedelta) -> list[str]:
    """Take up pending runs whose message seems lost and outcomes that were not delivered; return them.

    The time until the next look doubles with every call, up to 64 times `resend`.
    """
    return _ids(conn.execute(_SEND_AGAIN, given({"ids": list(run_ids), "resend": resend.total_seconds()})).all())


def recover(conn: Connection, seen: Due, *, crashes: int, resend: timedelta) -> bool:
    """Make a run whose lease ran out pending; return whether it was moved."""
    parameters = {
        "run_id": seen.id,
        "epoch": seen.epoch,
        "crashes": crashes,
        "crash_mark": seen.records,
        "due_in": resend.total_seconds(),
        "due_at": None,
    }
    return bool(_RECOVER(conn, parameters))


def fail_lost(conn: Connection, seen: Due, *, error: str, error_code: str, why: str, resend: timedelta) -> bool:
    """Fail a run whose lease ran out; a worker is to deliver that. Returns whether it was moved."""
    parameters = {
        "run_id": seen.id,
        "epoch": seen.epoch,
        "who": "sweeper",
        "why": why,
        "error": error,
        "result": None,
        "error_code": error_code,
        "due_in": resend.total_seconds(),
        "due_at": None,
    }
    return bool(_fail_lost(conn)(conn, parameters))


@per_dialect
def _fail_lost(insert: Any) -> Together:
    values = {"due_at": _DUE, "error_code": bind("error_code"), "finished_at": now(), "worker": None, "process": None}
    moved = _owned("fail", **values).where(run.c.due_at <= now())
    return Together(moved, [_note("fail", why=bind("why")), _keep_outcome(insert)])


def fail_unsendable(conn: Connection, run_id: str, *, error: str, why: str) -> bool:
    """Fail a pending run whose message cannot be sent; nobody can be told. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": "sweeper", "why": why, "error": error, "result": None}
    return bool(_fail_unsendable(conn)(conn, parameters))


@per_dialect
def _fail_unsendable(insert: Any) -> Together:
    values = {"due_at": None, "error_code": "payload", "finished_at": now()}
    moved = _moved("give_up", run.c.id == _RUN_ID, **values)
    return Together(moved, [_note("give_up", why=bind("why")), _keep_outcome(insert)])


def _ids(rows: Iterable[Any]) -> list[str]:
    return [row.id for row in rows]


# -- moves of people ---------------------------------------------------------------------------------


def cancel(conn: Connection, run_id: str, *, who: str, why: str, resend: timedelta) -> RunState | None:
    """Cancel a run, or ask its owner to when it is running.

    Returns:
        `cancelled` when it was moved, `running` when its owner was asked, None when it has ended or is unknown.
    """
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": resend.total_seconds(), "due_at": None}
    rows = _CANCEL(conn, parameters)
    return RunState(rows[0].state) if rows else None


def discard(conn: Connection, run_id: str, *, who: str, expired: bool) -> None:
    """End a run whose message Celery has discarded, and told its caller so."""
    why = "its message came after it expired" if expired else "revoked"
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": None, "due_at": None}
    if expired:
        _EXPIRE(conn, parameters)
    elif not _REVOKE(conn, parameters):
        told = sa.update(run).where(run.c.id == run_id, run.c.state == RunState.CANCELLED)
        conn.execute(told.values(due_at=None))


def time_out(conn: Connection, run_id: str, *, worker: str, error: str, why: str) -> bool:
    """Fail a run whose process was killed by the hard time limit. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": worker, "why": why, "error": error, "result": None}
    return bool(_time_out(conn)(conn, parameters))


@per_dialect
def _time_out(insert: Any) -> Together:
    values = {"due_at": None, "error_code": "timeout", "finished_at": now()}
    moved = _moved("fail", run.c.id == _RUN_ID, run.c.worker == bind("who"), **values)
    return Together(moved, [_note("fail", why=bind("why")), _keep_outcome(insert)])


def retry(conn: Connection, run_id: str, *, who: str, why: str, resend: timedelta) -> bool:
    """Take up an ended run again, with a fresh budget of attempts. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": resend.total_seconds(), "due_at": None}
    return bool(_RETRY(conn, parameters))


def replace_message(conn: Connection, run_id: str, envelope: str) -> None:
    """Change the stored message of a run, when Celery's `retry` was given new arguments."""
    conn.execute(sa.update(message).where(message.c.run_id == run_id).values(envelope=envelope))


@dataclass(frozen=True, slots=True)
class Stored:
    """The stored message of a run; `is_begun` is whether it was ever claimed."""

    run_id: str
    envelope: str
    attempt: int
    is_begun: bool


def envelopes(conn: Connection, run_ids: Sequence[str]) -> dict[str, Stored]:
    """Return the stored message of each run."""
    rows = conn.execute(_SELECT_ENVELOPES, given({"ids": list(run_ids)}))
    return {row.id: Stored(row.id, row.envelope, row.attempt, row.epoch > 0) for row in rows}


_SELECT_ENVELOPES = (
    sa.select(run.c.id, message.c.envelope, run.c.attempt, run.c.epoch)
    .join(message, message.c.run_id == run.c.id)
    .where(run.c.id.in_(bind("ids", expanding=True)))
)


def prune(conn: Connection, *, keep: timedelta, most: int) -> int:
    """Delete runs that were started longer ago than `keep`, have ended and are delivered; return how many.

    At most `most` go at once, with all that belongs to them.
    """
    rows = conn.execute(_SELECT_OLD, given({"keep": -keep.total_seconds(), "most": most}))
    ids = [row.id for row in rows]
    if ids:
        for table in (step, history, message, outcome):
            conn.execute(sa.delete(table).where(table.c.run_id.in_(ids)))
        conn.execute(sa.delete(run).where(run.c.id.in_(ids)))
    return len(ids)


_SELECT_OLD = (
    sa.select(run.c.id)
    .where(run.c.created_at < _later("keep"), run.c.state.in_(TERMINAL), run.c.due_at.is_(None))
    .order_by(run.c.created_at)
    .limit(bind("most", sa.Integer))
    .with_for_update(skip_locked=True)
)


def waiting_groups(conn: Connection) -> list[str]:
    """Return the Celery groups that have a member which has not ended."""
    live = (
        sa.select(message.c.group_id)
        .join(run, run.c.id == message.c.run_id)
        .where(run.c.due_at.is_not(None), message.c.group_id.is_not(None))
        .distinct()
    )
    return list(conn.execute(live).scalars())


def replace(conn: Connection, run_id: str, *, epoch: int, who: str) -> bool:
    """Forget a running run whose id Celery's `replace` gives to another task. Returns whether it was ours."""
    forgotten = sa.delete(run).where(run.c.id == run_id, run.c.epoch == epoch, run.c.state == RunState.RUNNING)
    if conn.execute(forgotten).rowcount == 0:
        return False
    conn.execute(sa.insert(history).values(run_id=run_id, what="replace", who=who, epoch=epoch))
    for table in (message, step, outcome):
        conn.execute(sa.delete(table).where(table.c.run_id == run_id))
    return True


# -- the statements' parts ---------------------------------------------------------------------------


def _moved(move: str, *guards: ColumnElement[bool], **values: Any) -> UpdateBase:
    """Return the guarded UPDATE of one move; no other statement but the claim changes a state."""
    target = MOVES[move]
    statement = sa.update(run).where(run.c.state.in_(target.sources), *guards).values(state=target.target, **values)
    return statement.returning(run.c.id, run.c.epoch, run.c.version)


def _owned(move: str, **values: Any) -> Any:
    """Return the UPDATE of a move out of `running`, which only the owner of the epoch may make."""
    return _moved(move, run.c.id == _RUN_ID, run.c.epoch == _EPOCH, run.c.state == RunState.RUNNING, **values)


def _note(
    what: str, *, who: Any = None, why: Any = None, version: Any = None, while_running: str | None = None
) -> Callable[[FromClause], UpdateBase]:
    """Return the insert of the history row of a move; one that left the run running is named differently."""

    def make(moved: FromClause) -> UpdateBase:
        columns = {
            "run_id": moved.c.id,
            "what": sa.literal(what)
            if while_running is None
            else sa.case((moved.c.state == RunState.RUNNING, while_running), else_=what),
            "who": bind("who") if who is None else who,
            "why": sa.null() if why is None else why,
            "epoch": moved.c.epoch,
            "version": moved.c.version if version is None else version,
        }
        return sa.insert(history).from_select([*columns], sa.select(*columns.values()))

    return make


_IN_IDS = run.c.id.in_(bind("ids", expanding=True))
_BY_SWEEPER: dict[str, Any] = {"who": sa.literal("sweeper")}

_WAKE = Together(
    _moved("wake", _IN_IDS, run.c.due_at <= now(), due_at=_later("resend"), wait=None, sends=0),
    [_note("wake", **_BY_SWEEPER)],
)
_SEND_AGAIN = (
    sa.update(run)
    .where(_IN_IDS, run.c.due_at <= now(), run.c.state.in_([RunState.PENDING, *TERMINAL]))
    .values(
        sends=run.c.sends + 1,
        worker=None,
        due_at=now(
            bind("resend", sa.Float)
            * sa.literal(1).bitwise_lshift(sa.case((run.c.sends < _MOST_DOUBLINGS, run.c.sends), else_=_MOST_DOUBLINGS))
        ),
    )
    .returning(run.c.id)
)
_RECOVER = Together(
    _owned(
        "recover",
        due_at=_DUE,
        worker=None,
        process=None,
        crashes=bind("crashes", sa.Integer),
        crash_mark=bind("crash_mark", sa.Integer),
    ).where(run.c.due_at <= now()),
    [_note("recover", why=sa.literal("the lease ran out"), **_BY_SWEEPER)],
)
_IS_RUNNING = run.c.state == RunState.RUNNING
# One statement for both cases: a run that stops running in between is then found in its new state.
_CANCEL = Together(
    sa.update(run)
    .where(run.c.id == _RUN_ID, run.c.state.in_(MOVES["cancel"].sources))
    .values(
        state=sa.case((_IS_RUNNING, run.c.state), else_=MOVES["cancel"].target),
        cancel_requested=True,
        due_at=sa.case((_IS_RUNNING, run.c.due_at), else_=_DUE),
        finished_at=sa.case((_IS_RUNNING, run.c.finished_at), else_=now()),
        wait=sa.case((_IS_RUNNING, run.c.wait), else_=sa.null()),
        worker=sa.case((_IS_RUNNING, run.c.worker), else_=sa.null()),
    )
    .returning(run.c.id, run.c.epoch, run.c.version, run.c.state),
    [_note("cancel", why=bind("why"), while_running="ask_to_cancel")],
)
_EXPIRE = Together(
    _moved("expire", run.c.id == _RUN_ID, run.c.epoch == 0, due_at=None, finished_at=now()),
    [_note("expire", why=bind("why"))],
)
_REVOKE = Together(
    _moved("cancel", run.c.id == _RUN_ID, due_at=None, finished_at=now(), wait=None),
    [_note("cancel", why=bind("why"))],
)
_RETRY = Together(
    _moved(
        "retry",
        run.c.id == _RUN_ID,
        due_at=_DUE,
        attempt=run.c.attempt + 1,
        first_attempt=run.c.attempt + 1,
        crashes=0,
        sends=0,
        error_code=None,
        finished_at=None,
        worker=None,
        cancel_requested=False,
    ),
    [_note("retry", why=bind("why"))],
)
