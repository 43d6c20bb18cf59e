"""What the bodies of durable tasks call.

Each of these finds the run that calls it; outside a durable task a step is the plain function, and
whatever needs a run says so.
"""

import functools
import inspect
import random as _random
import uuid as _uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, ParamSpec, TypeVar, overload

from celery_durable.codec import Codec, hints_of
from celery_durable.engine import context
from celery_durable.engine.context import Context
from celery_durable.errors import UsageError
from celery_durable.retry import RetryPolicy

P = ParamSpec("P")
R = TypeVar("R")

_INSTANT = Codec("now()", datetime)
_UUID = Codec("uuid4()", _uuid.UUID)
_NUMBER = Codec("random()", float)
_ANSWER = Codec("patched()", bool)


@overload
def step(
    function: Callable[P, R],
    /,
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    transactional: bool = False,
) -> Callable[P, R]: ...


@overload
def step(
    *, name: str | None = None, retry: RetryPolicy | None = None, transactional: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def step(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    transactional: bool = False,
) -> Any:
    """Make a function whose calls inside a durable task are recorded, as decorator or inline.

    The first call executes the function and stores what it returns as JSON; every later execution of the
    body gets the stored value. With a return annotation the value comes back as that type, without one it
    has to be plain JSON. Outside a durable task, and inside another step, it is the plain function.

    Args:
        name: what the record is called; the function's name unless given.
        retry: how often and how soon to try again; one attempt unless given. An attempt's delay shorter
            than `durable_inline_delay` is slept in the worker, a longer one suspends the run.
        transactional: take the step inside the transaction that commits its record, so that what it writes
            through `current_run().connection` happens exactly once. For tables in the store's own database;
            keep it short.

    Raises:
        PayloadError: when called, if the output cannot be stored.
        ConflictError: when called, if two functions of one run have the same name.
    """
    if function is None:
        return functools.partial(step, name=name, retry=retry, transactional=transactional)
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"step expects a plain function, got: the coroutine function {function.__qualname__!r}")
    label = name or getattr(function, "__name__", "")
    if not label or label == "<lambda>":
        raise UsageError("a step of a lambda or a callable object needs a name; write step(…, name='…')")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise UsageError(f"step {label!r} expects retry as a RetryPolicy, got: {retry!r}")
    identity = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', label)}"
    codec = Codec(f"the output of step {label!r}", hints_of(function).get("return", inspect.Parameter.empty))
    policy = retry or RetryPolicy.none()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = context.current()
        if run is None or run.step_key is not None:
            return function(*args, **kwargs)
        return run.step(
            label,
            function,
            args,
            kwargs,
            identity=identity,
            codec=codec,
            policy=policy,
            transactional=transactional,
        )

    return call


def sleep(duration: float | timedelta) -> None:
    """Wait for so many seconds, or a timedelta, without holding a worker.

    The time counts from the first execution on, by the store's clock.

    Raises:
        UsageError: for a negative duration, or outside a durable task.
    """
    run = _required("sleep")
    try:
        seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    except (TypeError, ValueError):
        raise UsageError(f"sleep expects seconds or a timedelta, got: {duration!r}") from None
    if not 0 <= seconds <= timedelta.max.total_seconds():
        raise UsageError(f"sleep expects 0 seconds or more, got: {duration!r}")
    until = datetime.now(UTC) + timedelta(seconds=min(seconds, 10**9))
    run.sleep(seconds=seconds, why=f"sleeping until {until:%Y-%m-%d %H:%M:%S} UTC")


def sleep_until(at: datetime) -> None:
    """Wait until an aware datetime, by the store's clock; one in the past is over at once.

    Raises:
        UsageError: for a naive datetime, or outside a durable task.
    """
    run = _required("sleep_until")
    if getattr(at, "tzinfo", None) is None:
        raise UsageError(
            f"sleep_until expects an aware datetime, got: {at!r}; give it a tzinfo, datetime.UTC for example"
        )
    run.sleep(until=at.astimezone(UTC), why=f"sleeping until {at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")


def now() -> datetime:
    """Return the present time in UTC, recorded: every execution of the body sees the same."""
    value: datetime = _required("now").value("now", lambda: datetime.now(UTC), _INSTANT)
    return value


def uuid4() -> _uuid.UUID:
    """Return a random UUID, recorded."""
    value: _uuid.UUID = _required("uuid4").value("uuid4", _uuid.uuid4, _UUID)
    return value


def random() -> float:
    """Return a random number from 0 up to 1, recorded."""
    value: float = _required("random").value("random", _random.random, _NUMBER)
    return value


def patched(change_id: str) -> bool:
    """Return whether this run takes the new side of a change of the code; the answer is recorded.

    It is true unless the run had gone past this place before the gate existed.
    """
    return _required("patched").is_past_gate(change_id, _ANSWER)


@dataclass(frozen=True, slots=True)
class CurrentRun:
    """The run that calls, as its body sees it."""

    _context: Context

    @property
    def id(self) -> str:
        """The run's id, which is its Celery task id."""
        return self._context.run_id

    @property
    def task(self) -> str:
        """The name of its task."""
        return self._context.task

    @property
    def attempt(self) -> int:
        """The number of the run's attempt, from 1."""
        return self._context.attempt

    @property
    def connection(self) -> Any:
        """The SQLAlchemy connection of the transactional step that calls; its transaction is the step's.

        An ORM session joins it by `Session(bind=current_run().connection)`. Do not commit it.

        Raises:
            UsageError: outside a transactional step.
        """
        if self._context.connection is None:
            raise UsageError("current_run().connection has a meaning inside a @step(transactional=True) only")
        return self._context.connection

    def idempotency_key(self, scope: Literal["step", "run"] = "step") -> str:
        """Return a UUID that stays the same however often this step, or this run, is executed.

        Hand it to an external service that knows idempotency keys, and a step that is executed again after
        a crash has its effect once.

        Raises:
            UsageError: for scope "step" outside a step.
        """
        return self._context.idempotency_key(scope)


def current_run() -> CurrentRun:
    """Return the run that calls, from its body or from one of its steps.

    Raises:
        UsageError: outside a durable task.
    """
    return CurrentRun(_required("current_run"))


def _required(what: str) -> Context:
    run = context.current()
    if run is None:
        raise UsageError(f"{what} was called outside a durable task; call it from the body of a @durable_task")
    return run
