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
from celery_durable.errors import CrashLoopError, PayloadError
from celery_durable.messages import dispatch
from celery_durable.runtime import Runtime
from celery_durable.states import SUSPENDED, RunState
from celery_durable.store import runs
from celery_durable.store.runs import Due

logger = logging.getLogger(__name__)

BATCH = 500
#: What Celery's Redis backend appends to a group's key: the parts, their number, errors, and the dedup set.
_CHORD_KEYS = ("", ".j", ".t", ".s", ".d")
#: After so many looks a message counts as lost even though its queue still holds others.
_PATIENT_LOOKS = 4


def sweep(app: Celery, runtime: Runtime, producer: Producer, *, trust_leases: bool) -> int:
    """Move on what is due and send its messages; return how many runs were moved.

    Args:
        trust_leases: whether a lease that ran out means that its worker is gone; not so just after the
            store itself was away, when no worker could renew.
    """
    moved = 0
    while True:
        due = runtime.database.once(lambda conn: runs.due(conn, BATCH))
        ready = _move(runtime, due, producer, trust_leases=trust_leases)
        if ready:
            for broken in dispatch.send_stored(app, runtime, ready, producer):
                _give_up(runtime, broken)
        moved += len(ready)
        if len(due) < BATCH or not ready:
            return moved


def keep_chords(app: Celery, runtime: Runtime) -> None:
    """Prolong what Redis keeps of chords that have a member here.

    Celery counts the parts of a chord under keys that expire a day after the last part came, and a chord
    whose keys are gone is never called, without an error.
    """
    backend = app.backend
    if not hasattr(backend, "get_key_for_group") or not hasattr(getattr(backend, "client", None), "pipeline"):
        return
    groups = runtime.database.once(runs.waiting_groups)
    lifetime = getattr(backend, "chord_expires", None) or backend.expires
    if not groups or not lifetime:
        return
    with backend.client.pipeline() as pipeline:
        for group in groups:
            for suffix in _CHORD_KEYS:
                pipeline.expire(backend.get_key_for_group(group, suffix), int(lifetime))
        pipeline.execute()


def _give_up(runtime: Runtime, run_id: str) -> None:
    """Fail a run whose stored message nobody can read, so that it does not come up again and again."""
    why = "its stored message cannot be read; start it again by hand"
    logger.error("run %s failed: %s", run_id, why)
    error = dump_error(PayloadError(why))
    runtime.database.once(lambda conn: runs.fail_unsendable(conn, run_id, error=error, why=why))


def _move(runtime: Runtime, due: Iterable[Due], producer: Producer, *, trust_leases: bool) -> list[str]:
    resend = runtime.settings.sweep_interval
    asleep: list[str] = []
    unsent: dict[str, Due] = {}
    ready: list[str] = []
    for run in due:
        if run.state in SUSPENDED:
            asleep.append(run.id)
        elif run.state is not RunState.RUNNING:
            unsent[run.id] = run
        elif trust_leases and _recover(runtime, run, resend):
            ready.append(run.id)
    if asleep:
        ready += runtime.database.once(lambda conn: runs.wake(conn, asleep, resend=resend))
    if unsent:
        taken = runtime.database.once(lambda conn: runs.send_again(conn, list(unsent), resend=resend))
        ready += _lost(producer, [unsent[run_id] for run_id in taken])
    return ready


def _lost(producer: Producer, unsent: Iterable[Due]) -> list[str]:
    """Return those whose message seems gone; where a queue holds messages, theirs may be among them."""
    depths: dict[str | None, int] = {}
    lost = []
    for run in unsent:
        if run.state is RunState.PENDING and run.sends < _PATIENT_LOOKS:
            if run.queue not in depths:
                depths[run.queue] = _depth(producer, run.queue)
            if depths[run.queue] > 0:
                continue
        lost.append(run.id)
    return lost


def _depth(producer: Producer, queue: str | None) -> int:
    if not queue:
        return 0
    try:
        with producer.connection.channel() as channel:
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except Exception as error:
        # Whatever a transport raises for a queue that is not there: then nothing is in it.
        logger.debug("the depth of queue %s is not known: %s", queue, error)
        return 0


def _recover(runtime: Runtime, run: Due, resend: timedelta) -> bool:
    crashes = 1 if run.records > run.crash_mark else run.crashes + 1
    if crashes <= runtime.settings.max_crashes:
        logger.warning("run %s is taken up again: the lease of its worker ran out (%s)", run.id, crashes)
        return runtime.database.once(lambda conn: runs.recover(conn, run, crashes=crashes, resend=resend))
    why = f"its worker died {crashes} times without a new record; look for what kills it, then retry the run"
    logger.error("run %s failed: %s", run.id, why)
    error = dump_error(CrashLoopError(why))
    return runtime.database.once(
        lambda conn: runs.fail_lost(conn, run, error=error, error_code=CrashLoopError.code, why=why, resend=resend)
    )
