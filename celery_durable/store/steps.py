"""The records of a run: what its steps returned, read at the claim and appended under its epoch.

A record that succeeded is never written again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import FromClause, ScalarSelect

from celery_durable.states import RunState, StepState
from celery_durable.store.expressions import Instant, now, rows_as_json, seconds_until
from celery_durable.store.statements import Prepared, bind, per_dialect
from celery_durable.store.tables import run, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One recorded step, value or wait of a run.

    `wake_in` is how many seconds from the moment of reading or writing its time comes.
    """

    key: str
    seq: int
    name: str
    kind: str
    state: StepState
    attempts: int = 1
    run_attempt: int = 1
    output: str | None = None
    error: str | None = None
    fingerprint: str | None = None
    wake_in: float | None = None
    wake_at: datetime | None = None
    took: timedelta = timedelta()


_LOADED = (
    step.c.key,
    step.c.seq,
    step.c.name,
    step.c.kind,
    step.c.state,
    step.c.attempts,
    step.c.run_attempt,
    step.c.output,
    step.c.error,
    step.c.fingerprint,
    seconds_until(step.c.wake_at),
)


def all_as_json() -> ScalarSelect[str]:
    """Return the sub-select that reads every record of `:run_id` inside another statement."""
    of_run = sa.select(rows_as_json(*_LOADED)).where(step.c.run_id == bind("run_id"))
    return of_run.scalar_subquery()


def from_json(text: str | None) -> list[Record]:
    """Return the records that `all_as_json` read, in the order in which they were made."""
    records = (
        Record(
            key=key,
            seq=seq,
            name=name,
            kind=kind,
            state=StepState(state),
            attempts=attempts,
            run_attempt=run_attempt,
            output=output,
            error=error,
            fingerprint=fingerprint,
            wake_in=wake_in,
        )
        for key, seq, name, kind, state, attempts, run_attempt, output, error, fingerprint, wake_in in json.loads(
            text or "[]"
        )
    )
    return sorted(records, key=lambda record: record.seq)


def load(conn: Connection, run_id: str) -> list[Record]:
    """Return every record of a run."""
    return from_json(Prepared(sa.select(all_as_json().label("records")))(conn, {"run_id": run_id})[0].records)


def append(conn: Connection, run_id: str, record: Record, *, epoch: int, version: str) -> bool | None:
    """Write a record for the owner of `epoch`, in one statement.

    Returns:
        Whether the run is to be cancelled, or None when nothing was written: the run is no longer held
        under `epoch`, or the record has succeeded before.
    """
    rows = _append(conn)(conn, {"run_id": run_id, "epoch": epoch, **values(record, version)})
    return bool(rows[0].cancel_requested) if rows else None


@per_dialect
def _append(insert: Any) -> Prepared:
    # FOR SHARE: the lease cannot be taken away between this fence and the commit of the record.
    owned = (
        sa.select(run.c.id)
        .where(
            run.c.id == bind("run_id"),
            run.c.epoch == bind("epoch", sa.Integer),
            run.c.state == RunState.RUNNING,
        )
        .with_for_update(read=True)
    )
    cancel = sa.select(run.c.cancel_requested).where(run.c.id == bind("run_id"))
    statement: UpdateBase = insert_from(insert)(owned, bind("epoch", sa.Integer)).returning(
        cancel.scalar_subquery().label("cancel_requested")
    )
    return Prepared(statement)


def values(record: Record, version: str) -> dict[str, Any]:
    """Return the bind parameters that `insert_from` expects."""
    return {
        "key": record.key,
        "seq": record.seq,
        "name": record.name,
        "kind": record.kind,
        "step_state": record.state,
        "attempts": record.attempts,
        "run_attempt": record.run_attempt,
        "output": record.output,
        "error": record.error,
        "fingerprint": record.fingerprint,
        "step_version": version,
        "wake_in": record.wake_in,
        "wake_at": record.wake_at,
        "ago": -record.took.total_seconds(),
        "is_over": record.state in (StepState.SUCCEEDED, StepState.FAILED),
    }


def insert_from(insert: Any) -> Callable[[Any, Any], Any]:
    """Return a function that builds the insert of one record for the run that a select yields."""

    def build(source: sa.Select[Any], epoch: Any) -> Any:
        wake_at = sa.func.coalesce(bind("wake_at", Instant), now(bind("wake_in", sa.Float)), type_=Instant)
        columns: dict[str, Any] = {
            "key": bind("key"),
            "seq": bind("seq", sa.Integer),
            "name": bind("name"),
            "kind": bind("kind"),
            "state": bind("step_state"),
            "attempts": bind("attempts", sa.Integer),
            "run_attempt": bind("run_attempt", sa.Integer),
            "epoch": epoch,
            "output": bind("output"),
            "error": bind("error"),
            "fingerprint": bind("fingerprint"),
            "version": bind("step_version"),
            "wake_at": wake_at,
            "started_at": now(bind("ago", sa.Float)),
            "finished_at": sa.case((bind("is_over", sa.Boolean), now()), else_=sa.null()),
        }
        statement = insert(step).from_select(["run_id", *columns], source.add_columns(*columns.values()))
        changed = {name: statement.excluded[name] for name in columns if name not in ("key", "started_at")}
        return statement.on_conflict_do_update(
            index_elements=[step.c.run_id, step.c.key], set_=changed, where=step.c.state != StepState.SUCCEEDED
        )

    return build


def dependent(insert: Any, epoch: Any) -> Callable[[FromClause], UpdateBase]:
    """Return the insert of a record for use in `Together`."""

    def make(moved: FromClause) -> UpdateBase:
        statement: UpdateBase = insert_from(insert)(sa.select(moved.c.id).where(sa.true()), epoch)
        return statement

    return make


def of_runs(conn: Connection, run_ids: Iterable[str]) -> list[Any]:
    """Return the whole rows of these runs' records, for reading by people."""
    chosen = sa.select(step).where(step.c.run_id.in_(list(run_ids))).order_by(step.c.run_id, step.c.seq)
    return list(conn.execute(chosen).all())
