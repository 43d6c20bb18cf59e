"""The task class of durable tasks, and the decorator that makes them.

A durable task is a Celery task: it is sent, routed, retried and revoked as one. What differs is that its
run is stored before its message is sent, and that a wait gives the worker back.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import CodeType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from celery import Celery, Task, shared_task
from celery.canvas import Signature as TaskSignature
from celery.utils.time import maybe_make_aware
from kombu import Producer
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid

from celery_durable import activation
from celery_durable.codec import Signature, checked, fingerprint
from celery_durable.engine import context
from celery_durable.engine.context import Context
from celery_durable.engine.outcome import Lost, Suspended
from celery_durable.errors import ConflictError, DurableError, UsageError
from celery_durable.handle import RunHandle
from celery_durable.messages.dispatch import StoringProducer
from celery_durable.messages.envelope import MARK, Envelope
from celery_durable.retry import RetryPolicy
from celery_durable.runtime import Runtime
from celery_durable.store import runs
from celery_durable.store.runs import NewRun

OnDivergence = Literal["ignore", "warn", "fail"]

#: So much after its time a message that was sent ahead comes; before it, the store would refuse it.
_AFTER_DUE = 0.05

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class DurableTask(Task):  # type: ignore[misc]
    """Base class of durable tasks: `app.task(base=DurableTask)`.

    A task of this class may set `retry_policy` (given as the option `retry`), `version` and
    `on_divergence`; the settings hold where it does not.
    """

    abstract = True
    Request = "celery_durable.worker.request:DurableRequest"
    acks_late = True
    reject_on_worker_lost = True
    #: Celery would write STARTED before a repeated message is recognised, over a final state.
    track_started = False

    #: The policy of the run's own attempts; None is the setting `durable_retry`.
    retry_policy: RetryPolicy | None = None
    #: The version of this task's code; None is the setting `durable_version` or a fingerprint.
    version: str | None = None
    #: What happens when code and record differ; None is the setting `durable_on_divergence`.
    on_divergence: OnDivergence | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if inspect.iscoroutinefunction(inspect.unwrap(getattr(cls.run, "__func__", cls.run))):
            raise UsageError(f"a durable task expects a plain function, got: the coroutine function {cls.__name__!r}")
        if isinstance(cls.__dict__.get("retry"), RetryPolicy):  # the option's name is that of a method
            cls.retry_policy = cls.__dict__["retry"]
            del cls.retry
        if cls.retry_policy is not None and not isinstance(cls.retry_policy, RetryPolicy):
            raise UsageError(f"task {cls.__name__!r} expects retry as a RetryPolicy, got: {cls.retry_policy!r}")
        if cls.on_divergence not in (None, "ignore", "warn", "fail"):
            raise UsageError(
                f"task {cls.__name__!r} expects on_divergence as 'ignore', 'warn' or 'fail', got: {cls.on_divergence!r}"
            )

    # -- what the task is ----------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """The store and the settings of the app that this task belongs to."""
        durable = getattr(self.app, "durable", None)
        if durable is None:
            raise UsageError(
                f"task {self.name!r} is durable but its app {self.app.main!r} is not; call Durable(app) first"
            )
        return cast(Runtime, durable.runtime)

    @functools.cached_property
    def parameters(self) -> Signature:
        """The declared parameters and result."""
        return Signature(self.run, self.name)

    @functools.cached_property
    def policy(self) -> RetryPolicy:
        """The retry policy of the run's own attempts."""
        if self.retry_policy is not None:
            return self.retry_policy
        # Celery's autoretry works through Task.retry, which becomes a durable timer; twice would be once too often.
        return RetryPolicy.none() if getattr(self, "autoretry_for", ()) else self.runtime.settings.retry

    @functools.cached_property
    def code_version(self) -> str:
        """The version of the code: as set, or a fingerprint of the task's function."""
        return (
            self.version
            or self.runtime.settings.version
            or _fingerprint_of(cast(Any, getattr(self, "_orig_run", self.run)))
        )

    # -- start ---------------------------------------------------------------------------------------

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        task_id: str | None = None,
        producer: Producer | None = None,
        *positional: Any,
        countdown: float | None = None,
        eta: datetime | None = None,
        tags: Sequence[str] = (),
        idempotency_key: str | None = None,
        idempotency_ttl: float | timedelta | None = None,
        **options: Any,
    ) -> RunHandle:
        """Store a run and send its message; takes every option of Celery's `apply_async`.

        `countdown` and `eta` become a timer in the store. When the broker is away the call succeeds and the
        message follows later. In the body of a durable task the start is recorded: it happens once, however
        often the body is executed again.

        Args:
            idempotency_key: the same key gives the same run, however often it is started.
            idempotency_ttl: how long the key stays taken, in seconds; `durable_idempotency_ttl` unless given.

        Raises:
            ConflictError: when the key was used for another task or another input.
            PayloadError: when an argument does not fit its annotation; nothing was stored.
            StoreUnavailable: when the store does not answer; nothing was stored, or the call can be repeated
                under the same `task_id`.
        """
        if self.app.conf.task_always_eager:
            return cast(RunHandle, super().apply_async(args, kwargs, task_id, producer, *positional, **options))
        start = _start_time(self.app, eta) or timedelta(seconds=max(countdown or 0, 0))
        storing = _Storing(self, start, tuple(tags), idempotency_key, idempotency_ttl)
        arguments = self.parameters.dump(args or (), kwargs or {})
        send = functools.partial(self._send, storing, arguments, producer, positional, options)
        run = context.current()
        if task_id is None and run is not None and run.step_key is None:
            return self.AsyncResult(run.child(self.name, send))
        return self.AsyncResult(send(task_id or uuid()))

    def _send(
        self,
        storing: "_Storing",
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        producer: Producer | None,
        positional: tuple[Any, ...],
        options: dict[str, Any],
        task_id: str,
    ) -> str:
        """Let Celery make the message, store the run with it and send it; return the id of the run."""
        args, kwargs = arguments
        options = {**options, "headers": {**(options.get("headers") or {}), MARK: True}}
        with self.app.producer_or_acquire(producer) as sender:
            if _is_near(sender, storing.start, self.runtime.settings.eta_horizon):
                options["countdown"] = _seconds_to(storing.start) + _AFTER_DUE
            known: list[str] = []

            def store(envelope: Envelope) -> bool:
                known.append(storing.store(task_id, fingerprint(args, kwargs), envelope))
                return known == [task_id] and (not storing.is_delayed or "countdown" in options)

            try:
                super().apply_async(
                    args, kwargs, task_id, StoringProducer(sender, task_id, store), *positional, **options
                )
            except OperationalError as error:  # Celery takes ours for the broker's where it can
                raise error.__cause__ if isinstance(error.__cause__, DurableError) else error from error.__cause__
        return known[0] or task_id

    def AsyncResult(self, task_id: str, **options: Any) -> RunHandle:
        """Return the handle of a run of this task."""
        return RunHandle(
            task_id,
            runtime=self.runtime,
            codec=self.parameters.result,
            **{"app": self._get_app(), "backend": self.backend, "task_name": self.name, **options},
        )

    # -- execute -------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the run of the current request; called directly, it is the plain function."""
        request = self.request
        if request.called_directly:
            return super().__call__(*args, **kwargs)
        if request.is_eager:
            return activation.run_eagerly(self, request, args, kwargs)
        return activation.activate(self, request, args, kwargs)

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Commit the suspension, now that Celery has stored RETRY."""
        activation.commit_suspension(self, self.request)
        super().on_retry(exc, task_id, args, kwargs, einfo)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> TaskSignature:
        """Return what Celery's `retry` sends; inside a run, sending it suspends the run instead."""
        signature = super().signature_from_request(request, args, kwargs, queue, **options)
        run = context.current()
        if run is None or run.run_id != self.request.id:
            return signature
        same = {"retries", "countdown", "eta", "task_id"}
        is_changed = args is not None or kwargs is not None or queue is not None or bool(options.keys() - same)
        return _Deferred(signature, self, run, is_changed=is_changed)

    def on_replace(self, sig: TaskSignature) -> Any:
        """Forget this run, whose id now belongs to the task that replaces it."""
        run = context.current()
        if run is not None and not self.request.is_eager:
            runtime = self.runtime
            runtime.execute(lambda conn: runs.replace(conn, run.run_id, epoch=run.epoch, who=runtime.worker))
            run.stop(Lost())
        return super().on_replace(sig)


@dataclass(frozen=True, slots=True)
class _Storing:
    """How a start goes into the store."""

    task: DurableTask
    start: datetime | timedelta
    tags: tuple[str, ...]
    key: str | None
    ttl: float | timedelta | None

    @property
    def is_delayed(self) -> bool:
        """Whether the run starts later."""
        return self.start != timedelta()

    def store(self, run_id: str, print_: str, envelope: Envelope) -> str:
        """Store the run.

        Returns:
            Its id; another one where the idempotency key is taken, none where the id is.
        """
        task, runtime = self.task, self.task.runtime
        checked(envelope.body, f"the input of {task.name}", runtime.settings.max_payload)
        new = NewRun(
            id=run_id,
            task=task.name,
            envelope=envelope.to_text(),
            queue=envelope.queue or envelope.routing_key,
            version=task.code_version,
            group_id=envelope.headers.get("group"),
            parent_id=envelope.headers.get("parent_id"),
            root_id=envelope.headers.get("root_id"),
            tags=json.dumps(self.tags) if self.tags else None,
            idempotency_key=self.key,
        )
        if self.key is not None:
            return self._store_once(new, print_)
        return run_id if runtime.execute(lambda conn: runs.start(conn, new, **self._when())) else ""

    def _store_once(self, new: NewRun, print_: str) -> str:
        runtime = self.task.runtime
        given = self.ttl if self.ttl is not None else runtime.settings.idempotency_ttl
        ttl = given if isinstance(given, timedelta) else timedelta(seconds=given)
        known = runtime.execute(lambda conn: runs.start_once(conn, new, fingerprint=print_, ttl=ttl, **self._when()))
        if known is None:
            return new.id
        if (known.task, known.fingerprint) != (new.task, print_):
            other = "another input" if known.task == new.task else f"the task {known.task}"
            raise ConflictError(f"idempotency key {self.key!r} was used for {other}, by run {known.run_id}")
        return known.run_id

    def _when(self) -> dict[str, Any]:
        if isinstance(self.start, datetime):
            return {"due_in": timedelta(), "due_at": self.start, "delayed": True}
        interval = self.task.runtime.settings.sweep_interval
        return {"due_in": self.start or interval, "delayed": self.is_delayed}


class _Deferred(TaskSignature):  # type: ignore[misc]
    """The signature of Celery's own retry: a timer in the store instead of a message."""

    def __init__(self, signature: TaskSignature, task: DurableTask, run: Context, *, is_changed: bool) -> None:
        super().__init__(signature, app=task.app)
        self.__dict__["given"] = (task, run, is_changed)

    def apply_async(self, *args: Any, **options: Any) -> None:
        """Note when the next attempt is due, and with which message where that is another one."""
        task, run, is_changed = self.__dict__["given"]
        eta, countdown = self.options.get("eta"), self.options.get("countdown") or 0
        run.stop(
            Suspended(
                move="back_off",
                why=f"retry {self.options.get('retries')} was asked for",
                due_in=None if eta else timedelta(seconds=countdown),
                due_at=_start_time(task.app, eta),
                next_attempt=True,
                envelope=self._message(task, run.run_id) if is_changed else None,
            )
        )

    def _message(self, task: DurableTask, run_id: str) -> str:
        """Let Celery make the message that it would have sent."""
        made: list[Envelope] = []

        def keep(envelope: Envelope) -> bool:
            made.append(envelope)
            return False

        options = {name: value for name, value in self.options.items() if name not in ("eta", "countdown", "task_id")}
        options["headers"] = {**(options.get("headers") or {}), MARK: True}
        with task.app.producer_or_acquire() as sender:
            producer = StoringProducer(sender, run_id, keep)
            Task.apply_async(task, self.args, self.kwargs, task_id=run_id, producer=producer, **options)
        return made[0].to_text()


class TaskOf(Protocol[P, R]):
    """A durable task as type checkers see it; what is not named here is Celery's own."""

    name: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function."""
        ...

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> RunHandle:
        """Start a run."""
        ...

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        *,
        tags: Sequence[str] = (),
        **options: Any,
    ) -> RunHandle:
        """Start a run with options."""
        ...

    def __getattr__(self, name: str) -> Any: ...


@overload
def durable_task(function: Callable[P, R], /) -> TaskOf[P, R]: ...


@overload
def durable_task(
    *,
    bind: Literal[True],
    retry: RetryPolicy | None = None,
    version: str | None = None,
    on_divergence: OnDivergence | None = None,
    **options: Any,
) -> Callable[[Callable[Concatenate[Any, P], R]], TaskOf[P, R]]: ...


@overload
def durable_task(
    *,
    retry: RetryPolicy | None = None,
    version: str | None = None,
    on_divergence: OnDivergence | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], TaskOf[P, R]]: ...


def durable_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    retry: RetryPolicy | None = None,
    version: str | None = None,
    on_divergence: OnDivergence | None = None,
    **options: Any,
) -> Any:
    """Make a function a durable task of whatever app is current, as Celery's `shared_task` does.

    Args:
        retry: the policy of the run's own attempts; the setting `durable_retry` unless given.
        version: the version of this task's code; a fingerprint of the function unless set here or for the app.
        on_divergence: what happens when code and record differ; the setting `durable_on_divergence` unless given.
        options: every option of a Celery task.
    """
    if function is None:
        chosen_later: Any = functools.partial(
            durable_task, retry=retry, version=version, on_divergence=on_divergence, **options
        )
        return chosen_later
    given = {"retry_policy": retry, "version": version, "on_divergence": on_divergence}
    chosen = {name: value for name, value in given.items() if value is not None}
    return shared_task(**{"base": DurableTask, **chosen, **options})(function)


def _start_time(app: Celery, eta: datetime | None) -> datetime | None:
    return None if eta is None else maybe_make_aware(eta, tz=app.timezone)


def _is_near(producer: Producer, start: datetime | timedelta, horizon: timedelta) -> bool:
    """Return whether the broker may carry the message ahead of its time.

    RabbitMQ hands such messages out a few a second and holds back what is queued behind them.
    """
    return 0 < _seconds_to(start) <= horizon.total_seconds() and producer.connection.transport.driver_type != "amqp"


def _seconds_to(start: datetime | timedelta) -> float:
    return (start - datetime.now(UTC) if isinstance(start, datetime) else start).total_seconds()


def _fingerprint_of(function: Callable[..., Any]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    for part in _parts(code) if code is not None else [repr(function)]:
        digest.update(part.encode())
    return digest.hexdigest()


def _parts(code: CodeType) -> list[str]:
    parts = [code.co_code.hex(), repr(code.co_names)]
    for constant in code.co_consts:
        parts += _parts(constant) if isinstance(constant, CodeType) else [repr(constant)]
    return parts
