"""The app of the benchmarks, for their own process and for the workers: everything at its defaults."""

import os
import time
from pathlib import Path
from typing import Any

import redis
from celery import Celery, signals

from celery_durable import Durable, DurableTask, step

app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.update(durable_store_url=os.environ["BENCH_STORE"], broker_connection_retry_on_startup=True)
durable = Durable(app)
notes = redis.Redis.from_url(os.environ["BENCH_NOTES"])

#: What a step returns: small, but not nothing.
PAYLOAD = {"order": 4711, "amount": 49.9, "currency": "EUR", "address": "Main Street 1", "is_paid": True}


@signals.worker_ready.connect
def say_ready(**_: Any) -> None:
    Path(os.environ["BENCH_READY"]).touch()


@step
def charge(number: int) -> dict[str, Any]:
    return PAYLOAD


@step
def moment() -> float:
    return time.monotonic()


@app.task(base=DurableTask)
def many_steps(count: int) -> float:
    """Take `count` steps and return how many seconds they took."""
    began = time.perf_counter()
    for number in range(count):
        charge(number)
    return time.perf_counter() - began


@app.task(acks_late=True)
def plain(number: int) -> int:
    return number


@app.task(base=DurableTask)
def recorded(number: int) -> int:
    return number


@app.task(acks_late=True)
def plain_moment() -> float:
    """Return when the first line was reached; the clock is the same in all processes of one machine."""
    return time.monotonic()


@app.task(base=DurableTask)
def first_step() -> float:
    """Return when the first step was reached."""
    return moment()


@app.task(base=DurableTask)
def hold(key: str) -> int:
    """Hold the worker the first time, return at once the second time."""
    times = int(notes.rpush(key, f"{os.getppid()} {os.getpid()}"))
    if times == 1:
        time.sleep(120)
    return times
