"""Every move of a run.

Each function executes one guarded statement of `moves`. One that moved nothing is a refusal and says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from celery_durable.states import MOVES, RunState
from celery_durable.store import moves, steps
from celery_durable.store.expressions import now
from celery_durable.store.statements import given
from celery_durable.store.steps import Record
from celery_durable.store.tables import history, idempotency, message, outcome, run, step


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
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """The run that was started earlier under an idempotency key, and with what."""

    run_id: str
    task: str
    fingerprint: str


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
    return bool(moves.start(conn)(conn, _start_values(new, due_in, due_at, delayed=delayed)))


def start_once(
    conn: Connection,
    new: NewRun,
    *,
    fingerprint: str,
    ttl: timedelta,
    due_in: timedelta,
    due_at: datetime | None = None,
    delayed: bool = False,
) -> Known | None:
    """Store a run like `start`, unless its idempotency key is taken.

    Args:
        fingerprint: of the input, so that another one under the same key is noticed.
        ttl: how long the key stays taken.

    Returns:
        None for a new run, else what the key stands for.
    """
    values = _start_values(new, due_in, due_at, delayed=delayed)
    values |= {"fingerprint": fingerprint, "ttl": ttl.total_seconds()}
    if moves.start_once(conn)(conn, values):
        return None
    known = sa.select(idempotency.c.run_id, idempotency.c.task, idempotency.c.fingerprint)
    return Known(*conn.execute(known.where(idempotency.c.key == new.idempotency_key)).one())


def _start_values(new: NewRun, due_in: timedelta, due_at: datetime | None, *, delayed: bool) -> dict[str, Any]:
    return _values_of(new) | {
        "state": RunState.DELAYED if delayed else RunState.PENDING,
        "due_in": due_in.total_seconds(),
        "due_at": due_at,
    }


def claim(
    conn: Connection, run_id: str, *, worker: str, process: int, lease: timedelta, version: str | None
) -> Claim | None:
    """Take a stored run whose message has come; one statement.

    Returns:
        The run with all its records, or None when it is not pending, or not stored.
    """
    parameters = {
        "run_id": run_id,
        "worker": worker,
        "process": process,
        "lease": lease.total_seconds(),
        "version": version,
    }
    return _claim_of(conn, run_id, moves.CLAIM(conn, parameters))


def claim_or_store(conn: Connection, new: NewRun, *, worker: str, process: int, lease: timedelta) -> Claim | None:
    """Take a run whose message has come, storing it first where its producer did not; one statement.

    Returns:
        The run with all its records, or None when the message is stale: the run is not pending.
    """
    parameters = _values_of(new) | {"worker": worker, "process": process, "lease": lease.total_seconds()}
    return _claim_of(conn, new.id, moves.claim_or_store(conn)(conn, parameters))


def _claim_of(conn: Connection, run_id: str, rows: Sequence[Any]) -> Claim | None:
    if not rows:
        return None
    row = rows[0]
    # The records were read by the statement's snapshot. When the row had moved on since that snapshot was
    # taken, a record committed in between may be missing from it.
    is_current = row.epoch == 1 or (row.seen_epoch == row.epoch - 1 and row.seen_state != RunState.RUNNING)
    records = steps.from_json(row.records) if is_current else steps.load(conn, run_id)
    return Claim(row.epoch, RunState(row.state), row.attempt, row.first_attempt, bool(row.cancel_requested), records)


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
        "idempotency_key": new.idempotency_key,
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
    return bool(moves.suspend(conn, move, record is not None, next_attempt)(conn, parameters))


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
    if moves.finish(conn, move)(conn, parameters):
        return True
    # Either the run is lost, or this is a repetition after a lost connection.
    mine = sa.select(run.c.id).where(run.c.id == run_id, run.c.epoch == epoch, run.c.state == MOVES[move].target)
    return conn.execute(mine).first() is not None


def delivered(conn: Connection, run_ids: Iterable[str], *, worker: str) -> None:
    """Note that Celery has stored these outcomes and sent their callbacks."""
    conn.execute(moves.DELIVERED, given({"ids": list(run_ids), "worker": worker}))


def outcome_of(conn: Connection, run_id: str) -> tuple[str | None, str | None]:
    """Return the stored result and error of a run."""
    row = conn.execute(sa.select(outcome.c.result, outcome.c.error).where(outcome.c.run_id == run_id)).first()
    return (row.result, row.error) if row is not None else (None, None)


def exists(conn: Connection, run_id: str) -> bool:
    """Return whether there is a run of this id."""
    return conn.execute(sa.select(run.c.id).where(run.c.id == run_id)).first() is not None


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
    conn.execute(moves.RENEW, given(parameters))


def expire_lease(conn: Connection, run_id: str, *, worker: str, process: int) -> None:
    """End the lease of a run whose pool process is dead."""
    dead = sa.update(run).where(
        run.c.id == run_id, run.c.worker == worker, run.c.process == process, run.c.due_at.is_not(None)
    )
    conn.execute(dead.values(due_at=now()))


# -- moves of the sweeper ----------------------------------------------------------------------------


def due(conn: Connection, limit: int) -> list[Due]:
    """Return the runs whose time has come, the longest overdue first."""
    return [Due(*row[:1], RunState(row[1]), *row[2:]) for row in conn.execute(moves.SELECT_DUE, given({"most": limit}))]


def wake(conn: Connection, run_ids: Sequence[str], *, resend: timedelta) -> list[str]:
    """Make suspended runs whose time has come pending; return those that were moved."""
    return _ids(moves.WAKE(conn, {"ids": list(run_ids), "resend": resend.total_seconds()}))


def send_again(conn: Connection, run_ids: Sequence[str], *, resend: timedelta) -> list[str]:
    """Take up pending runs whose message seems lost and outcomes that were not delivered; return them.

    The time until the next look doubles with every call, up to 64 times `resend`.
    """
    return _ids(conn.execute(moves.SEND_AGAIN, given({"ids": list(run_ids), "resend": resend.total_seconds()})).all())


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
    return bool(moves.RECOVER(conn, parameters))


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
    return bool(moves.fail_lost(conn)(conn, parameters))


def fail_unsendable(conn: Connection, run_id: str, *, error: str, why: str) -> bool:
    """Fail a pending run whose message cannot be sent; nobody can be told. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": "sweeper", "why": why, "error": error, "result": None}
    return bool(moves.give_up(conn)(conn, parameters))


def _ids(rows: Iterable[Any]) -> list[str]:
    return [row.id for row in rows]


# -- moves of people ---------------------------------------------------------------------------------


def cancel(conn: Connection, run_id: str, *, who: str, why: str, resend: timedelta) -> RunState | None:
    """Cancel a run, or ask its owner to when it is running.

    Returns:
        `cancelled` when it was moved, `running` when its owner was asked, None when it has ended or is unknown.
    """
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": resend.total_seconds(), "due_at": None}
    rows = moves.CANCEL(conn, parameters)
    return RunState(rows[0].state) if rows else None


def discard(conn: Connection, run_id: str, *, who: str, expired: bool) -> None:
    """End a run whose message Celery has discarded, and told its caller so."""
    why = "its message came after it expired" if expired else "revoked"
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": None, "due_at": None}
    if expired:
        moves.EXPIRE(conn, parameters)
    elif not moves.REVOKE(conn, parameters):
        told = sa.update(run).where(run.c.id == run_id, run.c.state == RunState.CANCELLED)
        conn.execute(told.values(due_at=None))


def time_out(conn: Connection, run_id: str, *, worker: str, error: str, why: str) -> bool:
    """Fail a run whose process was killed by the hard time limit. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": worker, "why": why, "error": error, "result": None}
    return bool(moves.time_out(conn)(conn, parameters))


def retry(conn: Connection, run_id: str, *, who: str, why: str, resend: timedelta) -> bool:
    """Take up an ended run again, with a fresh budget of attempts. Returns whether it was moved."""
    parameters = {"run_id": run_id, "who": who, "why": why, "due_in": resend.total_seconds(), "due_at": None}
    return bool(moves.RETRY(conn, parameters))


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
    rows = conn.execute(moves.SELECT_ENVELOPES, given({"ids": list(run_ids)}))
    return {row.id: Stored(row.id, row.envelope, row.attempt, row.epoch > 0) for row in rows}


def prune(conn: Connection, *, keep: timedelta, most: int) -> int:
    """Delete runs that were started longer ago than `keep`, have ended and are delivered; return how many.

    At most `most` go at once, with all that belongs to them.
    """
    rows = conn.execute(moves.SELECT_OLD, given({"keep": -keep.total_seconds(), "most": most}))
    ids = [row.id for row in rows]
    if ids:
        for table in (step, history, message, outcome):
            conn.execute(sa.delete(table).where(table.c.run_id.in_(ids)))
        conn.execute(sa.delete(run).where(run.c.id.in_(ids)))
    conn.execute(sa.delete(idempotency).where(idempotency.c.expires_at < now()))
    return len(ids)


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
