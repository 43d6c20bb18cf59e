"""What a caller gets back for a run it started: Celery's result, and the run behind it."""

import time
from typing import Any

from celery.backends.base import DisabledBackend
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, assert_will_not_block

from celery_durable.codec import Codec, load_error
from celery_durable.errors import PayloadError, RunCancelled, UsageError
from celery_durable.messages import dispatch
from celery_durable.runtime import Runtime
from celery_durable.states import TERMINAL, RunState
from celery_durable.store import queries, runs
from celery_durable.store.queries import HistoryEntry, Run, StepRecord


class _WaitedTooLong(CeleryTimeout, TimeoutError):  # type: ignore[misc]
    """Celery's own timeout, and Python's."""


class RunHandle(AsyncResult):  # type: ignore[misc]
    """An `AsyncResult` that also shows and steers the run.

    Args:
        runtime: the runtime of the app that the run belongs to.
        codec: the codec of the task's return annotation.
    """

    def __init__(
        self, id: str, *args: Any, runtime: Runtime | None = None, codec: Codec | None = None, **options: Any
    ) -> None:
        super().__init__(id, *args, **options)
        self._runtime = runtime
        self._codec = codec

    @property
    def run(self) -> Run:
        """The run as it stands now.

        Raises:
            UsageError: when the store has no run of this id.
        """
        found = self._store.database.once(lambda conn: queries.get(conn, self.id))
        if found is None:
            raise UsageError(
                f"no run has the id {self.id!r}; either it was deleted or its first message has not come yet"
            )
        return found

    @property
    def steps(self) -> list[StepRecord]:
        """The run's records in the order in which they were made."""
        return self._store.database.once(lambda conn: queries.steps_of(conn, self.id))

    @property
    def history(self) -> list[HistoryEntry]:
        """Every move of the run."""
        return self._store.database.once(lambda conn: queries.history_of(conn, self.id))

    def cancel(self, why: str = "cancelled through its handle") -> bool:
        """Cancel the run, or ask its worker to at the run's next step; return whether it had not ended."""
        interval = self._store.settings.sweep_interval
        move = self._store.database.once(
            lambda conn: runs.cancel(conn, self.id, who="caller", why=why, resend=interval)
        )
        if move is RunState.CANCELLED:
            dispatch.send_stored(self.app, self._store, [self.id])  # a worker is to tell Celery
        return move is not None

    def get(
        self, timeout: float | None = None, propagate: bool = True, interval: float = 0.5, *args: Any, **options: Any
    ) -> Any:
        """Wait for the result, as `AsyncResult.get` does, and return it as the type that the task declares.

        Without a result backend the store is asked, each `interval` seconds.
        """
        if isinstance(self.backend, DisabledBackend):
            return self._get_from_store(timeout, propagate, interval)
        value = super().get(timeout, propagate, interval, *args, **options)
        if self._codec is None or value is None:
            return value
        try:
            return self._codec.from_json(value)
        except PayloadError:
            return value  # of a task that took this run's id by Celery's `replace`

    def _get_from_store(self, timeout: float | None, propagate: bool, interval: float) -> Any:
        assert_will_not_block()
        give_up = None if timeout is None else time.monotonic() + timeout
        while (run := self.run).state not in TERMINAL:
            if give_up is not None and time.monotonic() + interval > give_up:
                raise _WaitedTooLong(f"run {self.id} is {run.state}: {run.wait or 'it goes on'}")
            time.sleep(interval)
        result, error = self._store.database.once(lambda conn: runs.outcome_of(conn, self.id))
        if run.state is RunState.SUCCEEDED:
            return self._codec.load(result or "null") if self._codec else run.result
        failure = load_error(error) if error is not None else RunCancelled(f"run {self.id} is {run.state}")
        if propagate:
            raise failure
        return failure

    @property
    def _store(self) -> Runtime:
        if self._runtime is None:
            raise UsageError(
                f"the handle of run {self.id!r} has no app; take it from the task or from app.durable.runs"
            )
        return self._runtime
