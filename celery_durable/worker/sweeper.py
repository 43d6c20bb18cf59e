"""One pass over the store: whatever is due is moved on and its message sent.

Every worker makes passes. Each move is guarded by the state and the time it was read with, so that two
passes at once move no run twice; a message that could not be sent is due again a little later.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta

from celery import Celery
from kombu import Producer

from celery_durable.codec import dump_error
from celery_durable.errors import DurableError
from celery_durable.messages import dispatch
from celery_durable.runtime import Runtime
from celery_durable.states import SUSPENDED, RunState
from celery_durable.store import runs
from celery_durable.store.runs import Due

logger = logging.getLogger(__name__)

BATCH = 500


class CrashLoop(DurableError):
    """What a run ends with whose workers died again and again without a new record."""

    code = "crash_loop"


def sweep(app: Celery, runtime: Runtime, producer: Producer, *, trust_leases: bool) -> int:
    """Move on what is due and send its messages; return how many runs were moved.

    Args:
        trust_leases: whether a lease that ran out means that its worker is gone; not so just after the
            store itself was away, when no worker could renew.
    """
    moved = 0
    while True:
        due = runtime.database.once(lambda conn: runs.due(conn, BATCH))
        ready = _move(runtime, due, trust_leases=trust_leases)
        if ready:
            dispatch.send_stored(app, runtime, ready, producer)
        moved += len(ready)
        if len(due) < BATCH or not ready:
            return moved


def _move(runtime: Runtime, due: Iterable[Due], *, trust_leases: bool) -> list[str]:
    resend = runtime.settings.sweep_interval
    asleep: list[str] = []
    unsent: list[str] = []
    ready: list[str] = []
    for run in due:
        if run.state in SUSPENDED:
            asleep.append(run.id)
        elif run.state is not RunState.RUNNING:
            unsent.append(run.id)
        elif trust_leases and _recover(runtime, run, resend):
            ready.append(run.id)
    if asleep:
        ready += runtime.database.once(lambda conn: runs.wake(conn, asleep, resend=resend))
    if unsent:
        ready += runtime.database.once(lambda conn: runs.send_again(conn, unsent, resend=resend))
    return ready


def _recover(runtime: Runtime, run: Due, resend: timedelta) -> bool:
    crashes = 1 if run.records > run.crash_mark else run.crashes + 1
    if crashes <= runtime.settings.max_crashes:
        logger.warning("run %s is taken up again: the lease of its worker ran out (%s)", run.id, crashes)
        return runtime.database.once(lambda conn: runs.recover(conn, run, crashes=crashes, resend=resend))
    why = f"its worker died {crashes} times without a new record; look for what kills it, then retry the run"
    logger.error("run %s failed: %s", run.id, why)
    error = dump_error(CrashLoop(why))
    return runtime.database.once(
        lambda conn: runs.fail_lost(conn, run, error=error, error_code=CrashLoop.code, why=why, resend=resend)
    )
