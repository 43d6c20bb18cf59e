"""The thread in the worker's main process that keeps leases, makes passes and carries out notes.

It renews the leases of the runs that are really active here, and of no others, so that a run whose
suspension or finish could not be committed is taken up again. Only this thread talks to the store.
"""

import contextlib
import logging
import math
import os
import queue
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from billiard.exceptions import TimeLimitExceeded
from celery import Celery, bootsteps, signals

from celery_durable.codec import dump_error
from celery_durable.errors import DurableError, StoreUnavailable
from celery_durable.messages import dispatch
from celery_durable.messages.dispatch import BROKER_ERRORS
from celery_durable.runtime import Runtime
from celery_durable.states import RunState
from celery_durable.store import runs, schema, workers
from celery_durable.worker import control, request
from celery_durable.worker.request import (
    Deferred,
    Delivered,
    DueIn,
    Note,
    Orphaned,
    RevokeAsked,
    Revoked,
    TimedOut,
)
from celery_durable.worker.sweeper import keep_chords, sweep

logger = logging.getLogger(__name__)

_LOOK_AT_PROCESSES = 0.5
_LINGER = 0.1
_SHORTEST = 0.02
_PRUNE_EVERY, _PRUNE_MOST = 600.0, 500


class Keeper(bootsteps.StartStopStep):  # type: ignore[misc]
    """Celery's handle on the thread."""

    label = "Durable"
    # After the pool, because a thread must not run while the pool forks.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._runtime: Runtime = worker.app.durable.runtime
        # Before the fork, so that the pool's processes know whose they are.
        self._runtime.become_worker(f"{worker.hostname}/{uuid.uuid4().hex[:8]}")
        self._thread: KeeperThread | None = None
        self._pipe: tuple[int, ...] = ()

    def create(self, worker: Any) -> Any:
        """Return what Celery starts and stops: this step."""
        pool = worker.pool_cls if isinstance(worker.pool_cls, str) else worker.pool_cls.__module__
        if "eventlet" in pool:
            raise SystemExit("durable tasks do not run on the eventlet pool, whose database driver blocks; use gevent")
        control.drain_before_soft_shutdown(worker, self._runtime.drain)
        return self

    def start(self, worker: Any) -> None:
        """Check the store and start the thread."""
        try:
            self._runtime.database.once(schema.check)
        except DurableError as error:
            raise SystemExit(f"durable: {error}") from None
        signals.worker_shutting_down.connect(self._on_shutting_down)
        signals.worker_shutdown.connect(self._on_shutdown)
        self._thread = KeeperThread(worker.app, self._runtime, worker.hostname, self._wake_event_loop)
        self._thread.start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Let the thread wake the event loop, which else notices a dead process up to five seconds late.

        Until it does, the pool hands work to that process.
        """
        maintain = getattr(worker.pool, "maintain_pool", None)
        if maintain is None:
            return
        self._close_pipe()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)

        def on_wake() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._pipe[0], 1024)
            maintain()

        hub.add_reader(self._pipe[0], on_wake)

    def _wake_event_loop(self) -> None:
        if self._pipe:
            os.write(self._pipe[1], b".")

    def _close_pipe(self) -> None:
        for end in self._pipe:
            os.close(end)
        self._pipe = ()

    def stop(self, worker: Any) -> None:
        """Do nothing: the pool stops after this step, and its runs need their leases until then."""

    def terminate(self, worker: Any) -> None:
        """End the thread: the pool is killed next, and its runs are taken up when their leases run out."""
        self._on_shutdown()

    def info(self, worker: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` shows."""
        return {"durable": {"worker": self._runtime.worker, "passes": self._thread.passes if self._thread else 0}}

    def _on_shutting_down(self, **_: Any) -> None:
        self._runtime.drain()

    def _on_shutdown(self, **_: Any) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.finish()
            self._runtime.is_worker = False


class KeeperThread(threading.Thread):
    """Waits for notes and for the next moment at which something is to be done."""

    def __init__(
        self, app: Celery, runtime: Runtime, hostname: str, wake_event_loop: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name="durable-keeper", daemon=True)
        self.passes = 0
        self._workers = 1
        self._app = app
        self._runtime = runtime
        self._hostname = hostname
        self._wake_event_loop = wake_event_loop
        self._producer: Any = None
        self._notes: list[Note] = []
        self._stopping = threading.Event()
        self._next_pass = 0.0
        self._next_renewal = 0.0
        self._next_delivery = math.inf
        self._next_chords = time.monotonic() + self._chord_interval
        # Not at the start, when there is most to do, and not in all workers at once.
        self._next_pruning = time.monotonic() + random.uniform(0.5, 1.5) * _PRUNE_EVERY
        self._trusted_from = 0.0
        self._main = os.getpid()
        self._not_forking = threading.Lock()
        self._rest_while_forking()

    def run(self) -> None:
        """Keep going until the worker has stopped."""
        while not self._stopping.is_set():
            self._wait()
            try:
                with self._not_forking:
                    self._work()
            except StoreUnavailable as error:
                logger.warning(
                    "the store is away; leases are not judged until all workers could renew theirs: %s", error
                )
                self._trusted_from = time.monotonic() + self._lease
                self._next_renewal = 0.0
                self._stopping.wait(random.uniform(0.5, 1.0))
            except Exception:
                logger.exception("a pass over the store failed; the next one tries again")
                self._next_pass = time.monotonic() + self._interval
                self._stopping.wait(1.0)

    def _work(self) -> None:
        self._carry_out_notes()
        self._look_after_processes()
        if time.monotonic() >= self._next_renewal:
            self._renew()
        if time.monotonic() >= self._next_pass:
            self._pass()
        if time.monotonic() >= self._next_chords:
            self._keep_chords()
        if time.monotonic() >= self._next_pruning:
            self._prune()

    def _rest_while_forking(self) -> None:
        """Keep this thread out of the moments at which the pool forks.

        A child gets a copy of every lock of the process; one that this thread holds just then, of a client
        library or of logging, stays locked in the child for ever.
        """
        this = weakref.ref(self)

        def before() -> None:
            if (keeper := this()) is not None and keeper.is_alive():
                keeper._not_forking.acquire()

        def after() -> None:
            if (keeper := this()) is not None and keeper._not_forking.locked():
                keeper._not_forking.release()

        os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)

    def finish(self) -> None:
        """Carry out what is left, check out and end."""
        self._stopping.set()
        request.notes.put(DueIn(0.0))
        self.join(5)
        try:
            self._take_notes(block=0.0)
            self._carry_out_notes()
            self._deliver()
            self._runtime.database.once(lambda conn: workers.check_out(conn, self._runtime.worker))
        except DurableError as error:
            logger.warning("the worker left without checking out: %s", error)

    @property
    def _lease(self) -> float:
        return self._runtime.settings.lease.total_seconds()

    @property
    def _interval(self) -> float:
        return self._runtime.settings.sweep_interval.total_seconds()

    def _wait(self) -> None:
        now = time.monotonic()
        # Never for long, and without asking the store: nobody says when a process begins a run, or dies.
        until = min(self._next_pass - now, self._next_delivery - now, _LOOK_AT_PROCESSES)
        self._take_notes(block=0.0 if self._notes else max(until, 0.0))

    def _take_notes(self, *, block: float) -> None:
        try:
            self._notes.append(request.notes.get(timeout=block) if block > 0 else request.notes.get_nowait())
            while True:
                self._notes.append(request.notes.get_nowait())
        except queue.Empty:
            pass

    def _carry_out_notes(self) -> None:
        """Carry out what the event loop has left; what fails stays for the next time."""
        while self._notes:
            self._carry_out(self._notes[0])
            self._notes.pop(0)
        if time.monotonic() >= self._next_delivery:
            self._deliver()

    def _deliver(self) -> None:
        """Note what was delivered so far, in one statement."""
        finished = list(request.delivered)
        if finished:
            self._runtime.database.once(lambda conn: runs.delivered(conn, finished, worker=self._runtime.worker))
            for _ in finished:
                request.delivered.popleft()
        # What came meanwhile has woken nobody.
        self._next_delivery = time.monotonic() + _LINGER if request.delivered else math.inf

    def _carry_out(self, note: Note) -> None:
        database, worker = self._runtime.database, self._runtime.worker
        match note:
            case Orphaned(run_id, process):
                database.once(lambda conn: runs.expire_lease(conn, run_id, worker=worker, process=process))
                self._next_pass = 0.0
            case DueIn(seconds):
                self._next_pass = min(self._next_pass, time.monotonic() + seconds + _SHORTEST)
            case TimedOut(run_id, limit):
                error = TimeLimitExceeded(limit)
                why = f"the time limit of {limit:g} seconds was exceeded"
                database.once(lambda conn: runs.time_out(conn, run_id, worker=worker, error=dump_error(error), why=why))
            case Revoked(run_id, expired):
                database.once(lambda conn: runs.discard(conn, run_id, who=worker, expired=expired))
            case RevokeAsked(run_ids):
                for asked in run_ids:
                    self._cancel(asked)
            case Deferred(run_id):
                logger.warning("run %s is of a task that this worker does not know; it is left to another", run_id)
            case Delivered():
                self._next_delivery = min(self._next_delivery, time.monotonic() + _LINGER)

    def _cancel(self, run_id: str) -> None:
        resend = self._runtime.settings.sweep_interval
        move = self._runtime.database.once(
            lambda conn: runs.cancel(conn, run_id, who=self._runtime.worker, why="revoked", resend=resend)
        )
        if move is RunState.CANCELLED:
            dispatch.send_stored(self._app, self._runtime, [run_id], self._sender())

    def _look_after_processes(self) -> None:
        for held in request.held():
            process = held.worker_process
            if process is not None and process != self._main and request.is_dead(process):
                self._wake_event_loop()
                request.notes.put(Orphaned(held.id, process))
                held.worker_process = None  # said once

    def _renew(self) -> None:
        active = {held.id: held.worker_process for held in request.held() if held.worker_process is not None}
        if active:
            self._runtime.database.once(
                lambda conn: runs.renew(conn, active, worker=self._runtime.worker, lease=self._runtime.settings.lease)
            )
        self._next_renewal = time.monotonic() + self._lease / 3

    def _pass(self) -> None:
        outlook = self._check_in()
        self._workers = outlook.workers
        is_due = outlook.next_due is not None and outlook.next_due <= 0
        moved = 0
        if is_due:
            trust = time.monotonic() >= self._trusted_from
            moved = sweep(self._app, self._runtime, self._sender(), trust_leases=trust)
        self.passes += 1
        # With N workers each makes every Nth pass, and whoever looked last knows what is due until the next.
        turn = self._interval * outlook.workers * random.uniform(1.0, 1.1)
        soon = turn if outlook.next_due is None else outlook.next_due
        if is_due:
            soon = _SHORTEST if moved else self._interval
        self._next_pass = time.monotonic() + max(_SHORTEST, min(turn, soon))

    def _keep_chords(self) -> None:
        self._next_chords = time.monotonic() + self._chord_interval
        try:
            keep_chords(self._app, self._runtime)
        except BROKER_ERRORS as error:
            logger.warning("chords with waiting members could not be kept alive: %s", error)

    def _prune(self) -> None:
        settings = self._runtime.settings
        gone = self._runtime.database.atomically(
            lambda conn: runs.prune(conn, keep=settings.retention, most=_PRUNE_MOST)
        )
        # A full batch means that there is more; it follows after the next pass.
        self._next_pruning = time.monotonic() + (self._interval if gone == _PRUNE_MOST else _PRUNE_EVERY)

    @property
    def _chord_interval(self) -> float:
        conf = self._app.conf
        expires = conf.get("result_chord_expires") or conf.result_expires
        seconds = expires.total_seconds() if isinstance(expires, timedelta) else float(expires or 86_400)
        return seconds / 3

    def _check_in(self) -> workers.Outlook:
        settings = self._runtime.settings
        return self._runtime.database.once(
            lambda conn: workers.check_in(
                conn, self._runtime.worker, self._hostname, seen_for=settings.sweep_interval * 1.5 * (self._workers + 1)
            )
        )

    def _sender(self) -> Any:
        """Return this thread's own producer; the app's pool belongs to the event loop."""
        if self._producer is None or not self._producer.connection.connected:
            connection = self._app.connection_for_write()
            self._producer = self._app.amqp.Producer(connection, auto_declare=False)
        return self._producer
