"""The tasks of `test_recovery`, in the app of `project`; a worker without them is one of the old release."""

import os
import signal
import time

from celery_durable import DurableTask, RetryPolicy, current_run, step
from tests.acceptance.project import app, note


@step
def first() -> int:
    note("first", current_run().id)
    return os.getpid()


@step
def slow(seconds: float) -> int:
    """Last so long; give the process that did."""
    note("begin", current_run().id, os.getpid())
    _spend(seconds)
    note("end", current_run().id, os.getpid())
    return os.getpid()


@step
def last() -> int:
    note("last", current_run().id)
    return os.getpid()


@app.task(base=DurableTask)
def three(seconds: float) -> list[int]:
    """Take a short step, one that lasts and a short one; give the processes."""
    return [first(), slow(seconds), last()]


@step
def stride(number: int, seconds: float) -> int:
    note("stride", number, current_run().id, os.getpid())
    _spend(seconds)
    return number


@app.task(base=DurableTask)
def strides(count: int, seconds: float) -> int:
    """Take so many steps that last."""
    return sum(stride(number, seconds) for number in range(count))


@step
def deadly() -> None:
    note("deadly", current_run().id, os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=DurableTask, retry=RetryPolicy.none())
def hopeless() -> None:
    """Take a step that no process survives."""
    first()
    deadly()


def _spend(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
