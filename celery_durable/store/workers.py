"""Who is there: one row for each worker that has checked in lately.

Workers share the passes over the store: with N of them, each makes every Nth.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import UpdateBase

from celery_durable.store.expressions import now, seconds_until
from celery_durable.store.statements import bind, given, per_dialect
from celery_durable.store.tables import run, worker


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a worker learns when it checks in.

    Args:
        workers: how many share the store, itself included.
        next_due: how soon the next run is due, in seconds; negative when one is overdue, None when none waits.
    """

    workers: int
    next_due: float | None


def check_in(conn: Connection, worker_id: str, name: str, *, seen_for: timedelta) -> Outlook:
    """Say that a worker is there for another `seen_for`, and look ahead; one statement."""
    parameters = {"worker_id": worker_id, "name": name, "seen_for": seen_for.total_seconds()}
    row = conn.execute(_check_in(conn), given(parameters)).one()
    return Outlook(1 + row.others, row.next_due)


@per_dialect
def _check_in(insert: Any) -> UpdateBase:
    others = worker.alias("others")
    is_another = others.c.id != bind("worker_id")
    count = sa.select(sa.func.count()).select_from(others).where(others.c.seen_until > now(), is_another)
    soonest = sa.select(seconds_until(sa.func.min(run.c.due_at))).where(run.c.due_at.is_not(None))
    inserted = insert(worker).values(
        id=bind("worker_id"),
        name=bind("name"),
        seen_until=now(bind("seen_for", sa.Float)),
    )
    statement: UpdateBase = inserted.on_conflict_do_update(
        index_elements=[worker.c.id], set_={"seen_until": inserted.excluded.seen_until}
    ).returning(count.scalar_subquery().label("others"), soonest.scalar_subquery().label("next_due"))
    return statement


def check_out(conn: Connection, worker_id: str) -> None:
    """Say that a worker is gone."""
    conn.execute(sa.delete(worker).where(worker.c.id == worker_id))
