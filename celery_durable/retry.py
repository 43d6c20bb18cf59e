"""When a failed attempt is tried again.

A policy is a value: an attempt's number and its error go in, a delay or None comes out. It is used
alike for steps and for whole runs, and nobody waits after the last attempt.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from pydantic_core import ValidationError

from celery_durable.errors import DurableError, UsageError

MAX_ATTEMPTS = 250

Seconds = float | timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how soon a failed attempt is tried again.

    The delay after attempt n is `min(max_delay, min_delay * factor ** (n - 1))`, in seconds; with
    `jitter` it is drawn evenly from the upper half of that, so that attempts of many runs spread out
    and none comes at once ("equal jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        max_attempts: how often the work is tried in all, 1 to 250.
        factor: by how much the delay grows from attempt to attempt; 1 keeps it.
        min_delay: the first delay, in seconds.
        max_delay: the longest delay, in seconds.
        jitter: whether to draw the delay at random.
        retry_on: errors that are tried again; all others are final.
        give_up_on: errors that are final even where `retry_on` names them.
        delay: replaces the formula: given the attempt and its error it returns seconds, or None to give up.
        step: seconds added per attempt instead of growing by `factor`; see `linear`.
    """

    max_attempts: int = 3
    factor: float = 2.0
    min_delay: float = 1.0
    max_delay: float = 60.0
    jitter: bool = True
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    give_up_on: tuple[type[BaseException], ...] = ()
    delay: Callable[[int, BaseException], Seconds | None] | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        attempts: Any = self.max_attempts
        if not (isinstance(attempts, int) and 1 <= attempts <= MAX_ATTEMPTS):
            raise UsageError(f"expected max_attempts from 1 to {MAX_ATTEMPTS}, got: {self.max_attempts!r}")
        if not 1 <= self.factor < math.inf:
            raise UsageError(f"expected a factor of at least 1, got: {self.factor!r}")
        if not 0 <= self.min_delay <= self.max_delay < math.inf:
            raise UsageError(
                f"expected 0 <= min_delay <= max_delay, got: min_delay={self.min_delay!r}, max_delay={self.max_delay!r}"
            )
        for name in ("retry_on", "give_up_on"):
            classes = getattr(self, name)
            if not isinstance(classes, tuple) or not all(_is_error_class(each) for each in classes):
                raise UsageError(f"expected {name} as a tuple of error classes, got: {classes!r}")

    @classmethod
    def none(cls) -> Self:
        """Return the policy of a single attempt."""
        return cls(max_attempts=1)

    @classmethod
    def fixed(cls, seconds: float, **options: Any) -> Self:
        """Return a policy with the same delay after every attempt."""
        return cls(**{"factor": 1.0, "min_delay": seconds, "max_delay": seconds, "jitter": False, **options})

    @classmethod
    def linear(cls, seconds: float, **options: Any) -> Self:
        """Return a policy whose delay grows by `seconds` with every attempt."""
        longest = max(seconds, options.pop("max_delay", 60.0))
        return cls(**{"min_delay": seconds, "max_delay": longest, "step": seconds, "jitter": False, **options})

    @classmethod
    def exponential(cls, min_delay: float = 1.0, **options: Any) -> Self:
        """Return a policy whose delay doubles, or grows by `factor`, with every attempt."""
        longest = max(min_delay, options.pop("max_delay", 60.0))
        return cls(**{"min_delay": min_delay, "max_delay": longest, **options})

    @classmethod
    def from_celery(cls, options: Mapping[str, Any]) -> Self:
        """Translate Celery's autoretry options of a task.

        Without `autoretry_for` Celery never retries by itself, so neither does the policy. Celery's
        `max_retries=None`, without end, becomes the cap of 250 attempts.
        """
        retry_on = tuple(options.get("autoretry_for") or ())
        if not retry_on:
            return cls.none()
        extra = options.get("retry_kwargs") or {}
        retries = extra.get("max_retries", options.get("max_retries", 3))
        attempts = MAX_ATTEMPTS if retries is None else min(int(retries) + 1, MAX_ATTEMPTS)
        common: dict[str, Any] = {
            "max_attempts": attempts,
            "retry_on": retry_on,
            "give_up_on": tuple(options.get("dont_autoretry_for") or ()),
        }
        backoff = options.get("retry_backoff") or 0
        if backoff:
            first = float(max(1, int(backoff)))
            longest = float(options.get("retry_backoff_max", 600))
            jitter = bool(options.get("retry_jitter", True))
            return cls.exponential(min(first, longest), max_delay=longest, jitter=jitter, **common)
        return cls.fixed(float(extra.get("countdown", options.get("default_retry_delay", 180))), **common)

    def celery_options(self) -> dict[str, Any]:
        """Return the autoretry options of a plain Celery task that come nearest to this policy.

        Raises:
            UsageError: for a policy that Celery cannot express: a `delay` function, linear growth, or a
                factor other than 1 and 2.
        """
        if self.delay is not None or self.step is not None or self.factor not in (1.0, 2.0):
            raise UsageError(f"Celery's options can express fixed delays and doubling ones only, got: {self!r}")
        options: dict[str, Any] = {
            "autoretry_for": self.retry_on,
            "dont_autoretry_for": self.give_up_on,
            "max_retries": self.max_attempts - 1,
            "retry_jitter": self.jitter,
        }
        if self.factor == 1.0:
            return options | {"retry_backoff": False, "retry_kwargs": {"countdown": self.min_delay}}
        return options | {"retry_backoff": max(1, round(self.min_delay)), "retry_backoff_max": round(self.max_delay)}

    def next_delay(self, attempt: int, error: BaseException) -> timedelta | None:
        """Return how long to wait after the failed attempt number `attempt`, or None to give up."""
        if attempt >= self.max_attempts or not self._is_retried(error):
            return None
        if self.delay is not None:
            chosen = self.delay(attempt, error)
            return None if chosen is None else _as_delay(chosen)
        grown = self.min_delay + self.step * (attempt - 1) if self.step is not None else self._grown(attempt)
        seconds = min(self.max_delay, grown)
        return timedelta(seconds=random.uniform(seconds / 2, seconds) if self.jitter else seconds)

    def _grown(self, attempt: int) -> float:
        try:
            return float(self.min_delay * self.factor ** (attempt - 1))
        except OverflowError:
            return self.max_delay

    def _is_retried(self, error: BaseException) -> bool:
        if isinstance(error, ValidationError) or (isinstance(error, DurableError) and not error.retryable):
            return False  # the same input would fail the same way
        return isinstance(error, self.retry_on) and not isinstance(error, self.give_up_on)


def _is_error_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _as_delay(value: Seconds) -> timedelta:
    delay = value if isinstance(value, timedelta) else timedelta(seconds=value)
    if delay < timedelta():
        raise UsageError(f"expected a delay of at least 0 seconds, got: {value!r}")
    return delay
