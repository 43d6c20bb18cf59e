"""What one activation of a run came to, as a value; someone else carries it out."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from celery_durable.store.steps import Record


class Suspend(BaseException):
    """Unwinds a body that has to stop here; not an `Exception`, so that user code cannot swallow it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended:
    """The body waits; nothing has been committed yet.

    Args:
        move: how the run leaves `running`.
        why: what it waits for, for people.
        due_in: how long, from the commit on.
        due_at: until when; it wins over `due_in`.
        record: what to record with the move.
        error: what made it wait, when an attempt has failed.
        next_attempt: whether the attempt that failed was the run's own.
        envelope: the message of the next attempt, where it is another one.
    """

    move: Literal["suspend", "back_off", "release"]
    why: str
    due_in: timedelta | None = None
    due_at: datetime | None = None
    record: Record | None = None
    error: BaseException | None = None
    next_attempt: bool = False
    envelope: str | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The body returned; `text` is what to store, `value` what Celery is told."""

    text: str
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The body raised for good."""

    error: Exception
    code: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The body ended because it was cancelled."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Lost:
    """The run is another worker's by now, or the store is out of reach of a worker that shuts down."""


Outcome = Completed | Suspended | Failed | Cancelled | Lost
