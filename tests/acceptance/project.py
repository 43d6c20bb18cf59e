"""The app that the workers of these tests run; each test gives it servers through the environment."""

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

from celery_durable import Durable, DurableTask, RetryPolicy, current_run, durable_task, sleep, step

app = Celery("project", broker=os.environ.get("TEST_BROKER"), backend=os.environ.get("TEST_BACKEND"))
app.conf.update(
    durable_store_url=os.environ.get("TEST_STORE", "sqlite:///unused.db"),
    durable_lease=float(os.environ.get("TEST_LEASE", "3")),
    durable_sweep_interval=float(os.environ.get("TEST_SWEEP", "1")),
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=True,
    worker_prefetch_multiplier=int(os.environ.get("TEST_PREFETCH", "4")),
    task_default_queue=os.environ.get("TEST_QUEUE", "celery"),
    **json.loads(os.environ.get("TEST_SETTINGS", "{}")),
)
durable = Durable(app)

#: Every effect that a step has is a line of this file, so that tests count what really happened.
LEDGER = Path(os.environ.get("TEST_LEDGER", os.devnull))


def note(*words: Any) -> None:
    """Append a line to the ledger; one write, so that processes do not mix theirs."""
    with LEDGER.open("a") as ledger:
        ledger.write(" ".join(map(str, words)) + "\n")


@app.task
def add(*numbers: int) -> int:
    return sum(numbers)


@app.task
def collect(*args: Any) -> Any:
    note("collect", json.dumps(args))
    return args[0] if args else None


@app.task
def errback(request: Any, exc: Any, traceback: Any) -> None:
    note("errback", request.id, type(exc).__name__, exc)


@step
def double(number: int) -> int:
    note("double", current_run().id, number)
    return number * 2


@app.task(base=DurableTask)
def naps(number: int, count: int = 1, nap: float = 1.1) -> int:
    """Double a number, sleep and double it again, `count` times."""
    number = double(number)
    for _ in range(count):
        sleep(nap)
        number = double(number)
    return number


@app.task(base=DurableTask)
def slow_step(seconds: float) -> str:
    """Take one step that lasts."""

    def last() -> int:
        note("begin", current_run().id, os.getpid())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
        note("end", current_run().id, os.getpid())
        return os.getpid()

    first = step(os.getpid, name="first")()
    return f"{first} {step(last, name='last')()}"


@durable_task(retry=RetryPolicy.none())
def fails_after_nap(text: str) -> None:
    """Sleep, then fail for good."""
    sleep(1.1)
    raise KeyError(text)
