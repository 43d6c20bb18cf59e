"""The current run: answers steps from the journal, or takes them and records what came out.

Nothing a body does here takes effect after it was told to stop: once a run is suspending, every further
call, in a `finally` block say, unwinds the body again.
"""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from celery_durable.codec import Codec, dump_error, fingerprint, load_error, text_of
from celery_durable.engine.journal import Journal
from celery_durable.engine.outcome import Lost, Suspend, Suspended
from celery_durable.errors import (
    DivergenceError,
    DurableError,
    PayloadError,
    RunCancelled,
    StoreUnavailable,
    UsageError,
)
from celery_durable.retry import RetryPolicy
from celery_durable.states import StepState
from celery_durable.store import runs, steps
from celery_durable.store.database import Connection, Database
from celery_durable.store.runs import Claim
from celery_durable.store.steps import Record

logger = logging.getLogger(__name__)

_NAMESPACE = uuid.UUID("6f1d1d0e-8f0b-4d6c-9a57-0c1f3a2b7e55")
_AT_ONCE = timedelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for a run while it is executed.

    Args:
        retry: the policy of the run's own attempts.
        control: errors by which a body speaks to whoever executes it; they go through unrecorded.
        timeouts: errors that mean that the activation ran out of time; no step is to blame for them.
        is_draining: whether the worker wants its runs back at the next step.
        on_step: told of every record of a step, after it was committed.
    """

    retry: RetryPolicy
    inline_delay: timedelta
    max_payload: int
    on_divergence: Literal["ignore", "warn", "fail"]
    version: str
    worker: str
    control: tuple[type[Exception], ...] = ()
    timeouts: tuple[type[Exception], ...] = ()
    is_draining: Callable[[], bool] = lambda: False
    on_step: Callable[[Record], None] = lambda record: None


class Context:
    """One activation of one run."""

    def __init__(self, database: Database, run_id: str, task: str, claim: Claim, rules: Rules) -> None:
        self.database = database
        self.run_id = run_id
        self.task = task
        self.epoch = claim.epoch
        self.attempt = claim.attempt
        self.attempt_of_budget = claim.attempt - claim.first_attempt + 1
        self.rules = rules
        self.journal = Journal(claim.records)
        self.ended: Suspended | Lost | None = None
        self.step_key: str | None = None
        #: The connection of the transactional step that is being taken.
        self.connection: Connection | None = None
        self._cancel_requested = claim.cancel_requested
        self._cancel_raised = False
        self._claimed_at = time.monotonic()

    # -- what bodies do ------------------------------------------------------------------------------

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        identity: str,
        codec: Codec,
        policy: RetryPolicy,
        transactional: bool = False,
    ) -> Any:
        """Return what the step recorded, or take it and record what comes out."""
        print_ = fingerprint(args, kwargs)
        key, record = self._arrive(name, "step", identity, print_)
        if record is not None and record.state is StepState.SUCCEEDED:
            return codec.load(record.output or "null")
        if record is not None and record.state is StepState.FAILED and record.run_attempt == self.attempt:
            raise load_error(record.error or "{}")
        made = Record(
            key=key,
            seq=record.seq if record else self.journal.next_seq(),
            name=name,
            kind="step",
            state=StepState.SUCCEEDED,
            run_attempt=self.attempt,
            fingerprint=print_,
        )
        if record is not None and record.state is StepState.RETRYING and record.run_attempt == self.attempt:
            made = replace(made, attempts=record.attempts + 1)
            self._wait_out(record, f"before attempt {made.attempts} of {key}")
        self._stop_if_draining()

        def take() -> str:
            with self._inside(key):
                return codec.dump(function(*args, **kwargs), self.rules.max_payload)

        return codec.load(self._attempts(made, take, policy, transactional=transactional))

    def _attempts(self, made: Record, take: Callable[[], str], policy: RetryPolicy, *, transactional: bool) -> str:
        while True:
            began = time.monotonic()
            try:
                if transactional:
                    return self._take_in_transaction(made, take).output or "null"
                text = take()
            except (*self.rules.control, *self.rules.timeouts):
                raise
            except Exception as error:
                failed = replace(made, error=dump_error(error), took=timedelta(seconds=time.monotonic() - began))
                delay = None if isinstance(error, PayloadError) else policy.next_delay(made.attempts, error)
                if delay is None:
                    self._write(replace(failed, state=StepState.FAILED))
                    raise
                self._back_off(replace(failed, state=StepState.RETRYING), delay, error)
                made = replace(made, attempts=made.attempts + 1)
            else:
                took = timedelta(seconds=time.monotonic() - began)
                return self._write(replace(made, output=text, took=took)).output or "null"

    def _take_in_transaction(self, made: Record, take: Callable[[], str]) -> Record:
        """Take a step in the transaction that commits its record: both happen, or neither."""

        def operation(conn: Connection) -> Record | None:
            # The run is not locked while the step is taken: its lease must be renewed meanwhile. The fence is
            # the record's own, at the end.
            if not runs.is_held(conn, self.run_id, self.epoch):
                return None
            known = self._known(conn, made.key)
            if known is not None and known.state is StepState.SUCCEEDED:
                return known  # of a commit whose answer was lost
            began = time.monotonic()
            self.connection = conn
            try:
                text = take()
            except Exception as error:
                if conn.invalidated or conn.closed:
                    raise
                raise _StepRaised(error) from error
            finally:
                self.connection = None
            record = replace(made, output=text, took=timedelta(seconds=time.monotonic() - began))
            cancel = steps.append(conn, self.run_id, record, epoch=self.epoch, version=self.rules.version)
            if cancel is None:
                raise _RecordRefused
            self._cancel_requested = cancel
            return record

        try:
            return self._committed(operation, atomically=True)
        except _StepRaised as raised:
            raise raised.error from None

    def _back_off(self, failed: Record, delay: timedelta, error: Exception) -> None:
        failed = replace(failed, wake_in=delay.total_seconds())
        if delay < self.rules.inline_delay:
            self._write(failed)
            time.sleep(delay.total_seconds())
            return
        why = f"attempt {failed.attempts} of {failed.key} failed: {type(error).__name__}: {text_of(error)}"
        self._stop(Suspended(move="back_off", why=why, due_in=delay, record=failed, error=error))

    def value(self, name: str, produce: Callable[[], Any], codec: Codec, *, is_gate: bool = False) -> Any:
        """Return the recorded value of `name`, or produce and record it."""

        def text(key: str) -> str:
            return codec.dump(produce(), self.rules.max_payload)

        return codec.load(self._recorded(name, "value", text, is_gate=is_gate))

    def child(self, task: str, start: Callable[[str], str]) -> str:
        """Return the id of the run that was started here, or start it and record that.

        Args:
            start: starts the run under the id that it is given and returns the run's id. The id is made of
                the place, so that a start whose record was lost is found when it is repeated.
        """

        def text(key: str) -> str:
            return json.dumps(start(str(uuid.uuid5(_NAMESPACE, f"{self.run_id}/{key}"))))

        child_id: str = json.loads(self._recorded(task, "child", text))
        return child_id

    def _recorded(self, name: str, kind: str, produce: Callable[[str], str], *, is_gate: bool = False) -> str:
        """Return the text that is recorded here, or produce it for its key and record it."""
        key, record = self._arrive(name, kind, "celery_durable", None, is_gate=is_gate)
        if record is None:
            self._stop_if_draining()
            text = produce(key)
            made = Record(
                key=key,
                seq=self.journal.next_seq(),
                name=name,
                kind=kind,
                state=StepState.SUCCEEDED,
                run_attempt=self.attempt,
                output=text,
            )
            record = self._write(made)
        return record.output or "null"

    def sleep(self, *, seconds: float | None = None, until: datetime | None = None, why: str) -> None:
        """Go on when the time has come; the first call fixes it."""
        key, record = self._arrive("sleep", "sleep", "celery_durable", None)
        if record is not None:
            if record.state is StepState.WAITING:
                self._wait_out(record, why)
            return
        made = Record(
            key=key,
            seq=self.journal.next_seq(),
            name="sleep",
            kind="sleep",
            state=StepState.WAITING,
            run_attempt=self.attempt,
            wake_in=seconds,
            wake_at=until,
        )
        if seconds is not None and seconds < self.rules.inline_delay.total_seconds():
            time.sleep(seconds)
            self._write(replace(made, state=StepState.SUCCEEDED, took=timedelta(seconds=seconds)))
            return
        due_in = None if seconds is None else timedelta(seconds=seconds)
        self._stop(Suspended(move="suspend", why=why, due_in=due_in, due_at=until, record=made))

    def is_past_gate(self, change_id: str, codec: Codec) -> bool:
        """Return whether the run went past this place before; see `patched`."""
        return bool(self.value(f"patched:{change_id}", lambda: not self.journal.unvisited, codec, is_gate=True))

    def idempotency_key(self, scope: Literal["step", "run"]) -> str:
        """Return a key that is the same whenever this step, or this run, is executed."""
        if scope == "step" and self.step_key is None:
            raise UsageError("idempotency_key(scope='step') has a meaning inside a step only; use scope='run' here")
        return str(uuid.uuid5(_NAMESPACE, self.run_id if scope == "run" else f"{self.run_id}/{self.step_key}"))

    # -- how it holds together -----------------------------------------------------------------------

    def finish_journal(self) -> None:
        """Report what was recorded and not come past, now that the body has returned.

        Raises:
            DivergenceError: where the policy is to fail.
        """
        if self.journal.unvisited:
            self._report(f"the record holds {self.journal.unvisited[0]!r}, which the code no longer takes")

    def stop(self, outcome: Suspended | Lost) -> None:
        """Note that the body is to stop, without unwinding it; the first reason stays."""
        if self.ended is None:
            self.ended = outcome

    def _stop(self, outcome: Suspended | Lost) -> None:
        self.ended = outcome
        raise Suspend

    def _arrive(
        self, name: str, kind: str, identity: str, print_: str | None, *, is_gate: bool = False
    ) -> tuple[str, Record | None]:
        if self.ended is not None:
            raise Suspend
        if self.step_key is not None:
            raise UsageError(
                f"{name} was called inside step {self.step_key!r}; only the body of a durable task can wait"
            )
        if self._cancel_requested and not self._cancel_raised:
            self._cancel_raised = True
            raise RunCancelled(f"run {self.run_id} was cancelled")
        key = self.journal.next_key(name, identity)
        record = self.journal.visit(key)
        # A gate is there to be new in the code.
        difference = None if is_gate else self.journal.difference(key, record, kind, print_)
        if difference is not None:
            self._report(difference, is_fatal=record is not None and record.kind != kind)
        return key, record

    def _report(self, difference: str, *, is_fatal: bool = False) -> None:
        sentence = f"run {self.run_id} of {self.task} diverged: {difference}"
        if is_fatal or self.rules.on_divergence == "fail":
            raise DivergenceError(sentence)
        if self.rules.on_divergence == "warn":
            logger.warning("%s", sentence)

    def _wait_out(self, record: Record, why: str) -> None:
        left = (record.wake_in or 0.0) - (time.monotonic() - self._claimed_at)
        if left <= 0:
            return
        if left < self.rules.inline_delay.total_seconds():
            time.sleep(left)
            return
        self._stop(Suspended(move="suspend", why=why, due_in=timedelta(seconds=left)))

    def _stop_if_draining(self) -> None:
        if self.rules.is_draining():
            self._stop(Suspended(move="release", why="the worker shuts down", due_in=_AT_ONCE))

    @contextlib.contextmanager
    def _inside(self, key: str) -> Iterator[None]:
        self.step_key = key
        try:
            yield
        finally:
            self.step_key = None

    def _write(self, record: Record) -> Record:
        """Write a record under this epoch, or end the activation if it is no longer ours."""
        return self._committed(lambda conn: self._append(conn, record))

    def _committed(self, operation: Callable[[Connection], Record | None], *, atomically: bool = False) -> Record:
        """Return the record that an operation has committed, or end the activation where it has committed none."""
        try:
            written = self.database.patiently(operation, self.rules.is_draining, atomically=atomically)
        except StoreUnavailable:
            logger.warning("run %s left as it is: the worker shuts down and the store does not answer", self.run_id)
            written = None
        except _RecordRefused:
            written = None
        if written is None:
            self._stop(Lost())
            raise AssertionError("unreachable")
        self.journal.add(written)
        if written.kind == "step":
            self.rules.on_step(written)
        return written

    def _append(self, conn: Connection, record: Record) -> Record | None:
        cancel = steps.append(conn, self.run_id, record, epoch=self.epoch, version=self.rules.version)
        if cancel is not None:
            self._cancel_requested = cancel
            return record
        if not runs.is_held(conn, self.run_id, self.epoch):
            return None
        # Written before, by a repetition whose answer was lost or by an owner before us: that record counts.
        return self._known(conn, record.key)

    def _known(self, conn: Connection, key: str) -> Record | None:
        return next((known for known in steps.load(conn, self.run_id) if known.key == key), None)


class _StepRaised(DurableError):
    """Carries what a transactional step raised past the store."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _RecordRefused(DurableError):
    """Rolls back a transactional step whose record was refused."""


_current: ContextVar[Context | None] = ContextVar("celery_durable_context", default=None)


def current() -> Context | None:
    """Return the context of the body that calls, also from inside a step."""
    return _current.get()


@contextlib.contextmanager
def activated(context: Context) -> Iterator[None]:
    """Make `context` the current one."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
