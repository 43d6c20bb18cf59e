"""The seams where Celery has none: revoke for runs that wait, and messages of tasks not known here.

Each is one wrapped function; see `docs/adr/0003-seams.md`. Nothing here talks to the store.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps, signals
from celery.utils.functional import maybe_list
from celery.worker.control import Panel

from celery_durable.messages.envelope import MARK
from celery_durable.worker.request import Deferred, DurableRequest, RevokeAsked, Revoked, notes

logger = logging.getLogger(__name__)


def install() -> None:
    """Let `revoke` reach runs that no worker executes; doing it twice changes nothing."""
    known = Panel.data["revoke"]
    if not getattr(known, "is_durable", False):
        Panel.data["revoke"] = _also_stored(known)
        signals.task_revoked.connect(_on_revoked, weak=False)


def _also_stored(revoke: Any) -> Any:
    @functools.wraps(revoke)
    def also_stored(state: Any, task_id: Any, *args: Any, **options: Any) -> Any:
        notes.put(RevokeAsked(tuple(maybe_list(task_id) or ())))
        return revoke(state, task_id, *args, **options)

    also_stored.is_durable = True  # type: ignore[attr-defined]
    return also_stored


def _on_revoked(sender: Any = None, request: Any = None, expired: bool = False, **_: Any) -> None:
    if getattr(sender, "Request", None) == f"{DurableRequest.__module__}:{DurableRequest.__qualname__}":
        notes.put(Revoked(request.id, bool(expired)))


def drain_before_soft_shutdown(worker: Any, drain: Callable[[], None]) -> None:
    """Have runs handed back during `worker_soft_shutdown_timeout`.

    Celery waits that long inside its signal handler, before it says to anyone that the worker shuts down.
    """
    wait = getattr(worker, "wait_for_soft_shutdown", None)
    if wait is None:  # Celery before 5.5.1
        return

    def drain_and_wait() -> None:
        drain()
        wait()

    worker.wait_for_soft_shutdown = drain_and_wait


class UnknownTasks(bootsteps.Step):  # type: ignore[misc]
    """Leaves messages of durable tasks that this worker does not know to workers that do.

    During a rolling deploy Celery would record such a task as failed. A run that was stored is sent again
    until a worker of the new code has it.
    """

    requires = ("celery.worker.consumer:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        refuse = consumer.on_unknown_task

        def on_unknown_task(body: Any, message: Any, exc: Exception) -> None:
            if message.headers.get(MARK):
                notes.put(Deferred(message.headers["id"]))
                message.ack_log_error(logger, consumer.connection_errors)
            else:
                refuse(body, message, exc)

        consumer.on_unknown_task = on_unknown_task
