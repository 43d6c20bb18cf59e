"""What people and programs read of runs; nothing here changes or locks anything."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from celery_durable.states import SUSPENDED, TERMINAL, RunState, StepState
from celery_durable.store.expressions import now
from celery_durable.store.tables import history, message, outcome, run, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as it stands.

    `args` and `kwargs` are the JSON values of the input, None where another serializer was used; `result` is the
    JSON value of the output, `error` the text of the final error; `wait` says what a suspended run waits for and
    `wake_at` until when.
    """

    id: str
    task: str
    state: RunState
    args: list[Any] | None
    kwargs: dict[str, Any] | None
    attempt: int
    result: Any
    error_code: str | None
    error: str | None
    tags: tuple[str, ...]
    wait: str | None
    wake_at: datetime | None
    parent_id: str | None
    root_id: str | None
    idempotency_key: str | None
    queue: str | None
    version: str | None
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One record of a run; `key` is its name and occurrence, such as `charge` and `charge#2`."""

    key: str
    name: str
    kind: str
    state: StepState
    attempts: int
    output: Any
    error: str | None
    version: str | None
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One move of a run: what it was, who made it and why."""

    at: datetime
    what: str
    who: str | None
    why: str | None
    epoch: int
    version: str | None


def get(conn: Connection, run_id: str) -> Run | None:
    """Return a run, or None when there is none of that id."""
    return next(iter(_runs(conn, _RUNS.where(run.c.id == run_id))), None)


def latest(conn: Connection, *, task: str | None = None, state: str | None = None, limit: int = 50) -> list[Run]:
    """Return the runs that were created last, the newest first."""
    chosen = _RUNS.order_by(run.c.created_at.desc()).limit(limit)
    if task is not None:
        chosen = chosen.where(run.c.task == task)
    if state is not None:
        chosen = chosen.where(run.c.state == state)
    return _runs(conn, chosen)


def steps_of(conn: Connection, run_id: str) -> list[StepRecord]:
    """Return the records of a run in the order in which they were made."""
    # A wait that is over is not written again, see `is_over`.
    is_over = (step.c.wake_at <= now()).label("is_over")
    rows = conn.execute(sa.select(step, is_over).where(step.c.run_id == run_id).order_by(step.c.seq))
    return [
        StepRecord(
            key=row.key,
            name=row.name,
            kind=row.kind,
            state=StepState.SUCCEEDED if row.state == StepState.WAITING and row.is_over else StepState(row.state),
            attempts=row.attempts,
            output=json.loads(row.output) if row.output is not None else None,
            error=_message(row.error),
            version=row.version,
            started_at=row.started_at,
            finished_at=row.finished_at or (row.wake_at if row.is_over and row.kind == "sleep" else None),
        )
        for row in rows
    ]


def history_of(conn: Connection, run_id: str) -> list[HistoryEntry]:
    """Return every move of a run, the first one first; it begins with its start."""
    created = conn.execute(sa.select(run.c.created_at, run.c.version).where(run.c.id == run_id)).first()
    if created is None:
        return []
    start = HistoryEntry(at=created.created_at, what="start", who=None, why=None, epoch=0, version=None)
    rows = conn.execute(sa.select(history).where(history.c.run_id == run_id).order_by(history.c.id))
    return [start] + [
        HistoryEntry(at=row.at, what=row.what, who=row.who, why=row.why, epoch=row.epoch, version=row.version)
        for row in rows
    ]


_RUNS = (
    sa.select(
        run,
        message.c.envelope,
        message.c.parent_id,
        message.c.root_id,
        message.c.tags,
        message.c.idempotency_key,
        outcome.c.result,
        outcome.c.error,
    )
    .join(message, message.c.run_id == run.c.id)
    # One that was retried keeps the outcome of its earlier end until it ends again.
    .outerjoin(outcome, sa.and_(outcome.c.run_id == run.c.id, run.c.state.in_(TERMINAL)))
)


def _runs(conn: Connection, chosen: sa.Select[Any]) -> list[Run]:
    return [_run_of(row) for row in conn.execute(chosen)]


def _run_of(row: Any) -> Run:
    state = RunState(row.state)
    args, kwargs = _input(row.envelope)
    return Run(
        id=row.id,
        task=row.task,
        state=state,
        args=args,
        kwargs=kwargs,
        attempt=row.attempt,
        result=json.loads(row.result) if row.result is not None else None,
        error_code=row.error_code,
        error=_message(row.error),
        tags=_tags(row.tags),
        wait=row.wait,
        wake_at=row.due_at if state in SUSPENDED else None,
        parent_id=row.parent_id,
        root_id=row.root_id,
        idempotency_key=row.idempotency_key,
        queue=row.queue,
        version=row.version,
        worker=row.worker,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _input(envelope: str) -> tuple[list[Any] | None, dict[str, Any] | None]:
    try:
        stored = json.loads(envelope)
        args, kwargs, _ = (
            json.loads(stored["body"]) if stored["content_type"] == "application/json" else (None, None, {})
        )
    except (ValueError, TypeError, KeyError):
        return None, None
    return args, kwargs


def _tags(text: str | None) -> tuple[str, ...]:
    tags: Sequence[str] = json.loads(text) if text else ()
    return tuple(tags)


def _message(error: str | None) -> str | None:
    if error is None:
        return None
    stored = json.loads(error)
    name = stored["type"].partition(":")[2]
    return f"{name}: {stored['message']}" if stored["message"] else name
