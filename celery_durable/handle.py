"""What a caller gets back for a run it started: Celery's result, and the run behind it."""

from typing import Any

from celery.result import AsyncResult

from celery_durable.codec import Codec
from celery_durable.errors import PayloadError, UsageError
from celery_durable.messages import dispatch
from celery_durable.runtime import Runtime
from celery_durable.states import RunState
from celery_durable.store import queries, runs
from celery_durable.store.queries import HistoryEntry, Run, StepRecord


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

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the result, as `AsyncResult.get` does, and return it as the type that the task declares."""
        value = super().get(*args, **options)
        if self._codec is None or value is None:
            return value
        try:
            return self._codec.from_json(value)
        except PayloadError:
            return value  # of a task that took this run's id by Celery's `replace`

    @property
    def _store(self) -> Runtime:
        if self._runtime is None:
            raise UsageError(
                f"the handle of run {self.id!r} has no app; take it from the task or from app.durable.runs"
            )
        return self._runtime
