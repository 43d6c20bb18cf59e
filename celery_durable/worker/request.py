"""What the worker's main process adds to a request: the captured message, and an eye on who holds what.

It runs inside the event loop, so it never talks to the store; it leaves notes for the bootstep's thread.
"""

import contextlib
import os
import queue
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery.exceptions import Ignore, Reject, Retry, Terminated
from celery.worker import state
from celery.worker.request import Request

from celery_durable.messages.envelope import captured

CAPTURED = "celery_durable"


@dataclass(frozen=True, slots=True)
class Delivered:
    """There are runs in `delivered`, after there were none."""


@dataclass(frozen=True, slots=True)
class Orphaned:
    """The pool process that executed a run is dead."""

    run_id: str
    process: int


@dataclass(frozen=True, slots=True)
class DueIn:
    """A run that was suspended here is due in so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The hard time limit has ended a run; Celery has told its caller already."""

    run_id: str
    limit: float


@dataclass(frozen=True, slots=True)
class Revoked:
    """Celery has discarded a run: it was revoked, or its message came after `expires`."""

    run_id: str
    expired: bool


@dataclass(frozen=True, slots=True)
class RevokeAsked:
    """Someone asked every worker to revoke these ids."""

    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deferred:
    """A run came whose task this worker does not know."""

    run_id: str


Note = Delivered | Orphaned | DueIn | TimedOut | Revoked | RevokeAsked | Deferred

#: One queue for one worker process, as `celery.worker.state` is.
notes: "queue.SimpleQueue[Note]" = queue.SimpleQueue()
#: Runs whose outcome Celery has stored, and told, until the keeper has noted that.
delivered: "deque[str]" = deque()


def note_delivered(run_id: str) -> None:
    """Leave a run for the keeper; only the first of a batch wakes it, which costs more than the note."""
    delivered.append(run_id)
    if len(delivered) == 1:
        notes.put(Delivered())


class DurableRequest(Request):  # type: ignore[misc]
    """A request of a durable task, in the worker's main process."""

    worker_process: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        # Celery derives a class per task and overrides on_success there, past anything inherited.
        super().__init_subclass__(**options)
        inherited = cls.on_success

        def on_success(self: DurableRequest, outcome: Any, **more: Any) -> Any:
            if not outcome[0]:
                note_delivered(self.id)
            return inherited(self, outcome, **more)

        cls.on_success = on_success

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        # `properties` is the one key of the request that is not sent on by Celery's own retry.
        self._request_dict["properties"] = {CAPTURED: captured(message, self._delivery_info)}

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Note which process executes the task."""
        self.worker_process = pid
        super().on_accepted(pid, time_accepted)

    def on_retry(self, exc_info: Any) -> None:
        """Note when a run that was suspended here is due."""
        when = getattr(exc_info.exception, "when", None)
        if isinstance(when, int | float):
            notes.put(DueIn(float(when)))
        super().on_retry(exc_info)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Keep a lost process from failing the task: the run goes on elsewhere."""
        error = exc_info.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        is_lost = isinstance(error, WorkerLostError | SystemExit | KeyboardInterrupt)
        if is_lost and not self._already_revoked and not getattr(self, "_already_cancelled", False):
            state.task_ready(self)
            if self.worker_process is not None:
                notes.put(Orphaned(self.id, self.worker_process))
            self.reject(requeue=True)  # it may have died before the run was stored
            self.send_event("task-retried", exception=repr(error), traceback="")
            return None
        answer = super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        is_rejected = isinstance(error, Reject) and not error.requeue
        if is_rejected or not isinstance(error, Ignore | Reject | Retry | Terminated):
            note_delivered(self.id)
        return answer

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Note that the hard time limit has ended the task."""
        super().on_timeout(soft, timeout)
        if not soft:
            notes.put(TimedOut(self.id, timeout))


def held() -> list[DurableRequest]:
    """Return the durable requests that a process of this worker executes."""
    return [
        request
        for request in _snapshot(state.active_requests)
        if isinstance(request, DurableRequest) and request.worker_process is not None
    ]


def _snapshot(requests: Any) -> list[Any]:
    while True:
        with contextlib.suppress(RuntimeError):  # the event loop changed the set while it was copied
            return list(requests)


def is_dead(process: int) -> bool:
    """Return whether a pool process of this worker has ended, before the pool itself has noticed."""
    if process == os.getpid() or not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return sys.platform == "linux" and not os.path.exists(f"/proc/{process}")
