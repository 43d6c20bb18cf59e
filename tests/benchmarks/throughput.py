"""A durable task without steps against the same plain task, through a real worker on Redis.

A task counts as done when its result is in the backend, which holds nothing else.
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from tests.benchmarks import project
from tests.benchmarks.report import Result, by_turns, ratio
from tests.benchmarks.setting import Setting, wait_until

TIMEOUT = 120.0


def measure(setting: Setting) -> list[Result]:
    rounds, count = (3, 200) if setting.is_quick else (7, 1000)
    results = redis.Redis.from_url(setting.environment()["BENCH_BACKEND"])

    def drain(task: Any) -> Callable[[], float]:
        def once() -> float:
            """Fill a queue of its own, then let the worker have it."""
            queue = f"drain-{time.monotonic_ns()}"
            results.flushdb()
            for number in range(count):
                task.apply_async((number,), queue=queue)
            project.app.control.add_consumer(queue, reply=True, limit=1)
            wait_until(results.dbsize, TIMEOUT, what="the first result", pause=0.001)
            began, before = time.monotonic(), results.dbsize()
            wait_until(lambda: results.dbsize() == count, TIMEOUT, what="the last result")
            took = time.monotonic() - began
            settle(queue)
            return (count - before) / took

        return once

    def publish(task: Any) -> Callable[[], float]:
        def once() -> float:
            results.flushdb()
            began = time.monotonic()
            for number in range(count):
                task.delay(number)
            wait_until(lambda: results.dbsize() == count, TIMEOUT, what="the last result")
            took = time.monotonic() - began
            settle()
            return count / took

        return once

    with setting.worker():
        drained = by_turns(rounds, drain(project.recorded), drain(project.plain))
        published = by_turns(rounds, publish(project.recorded), publish(project.plain))
    return [
        ratio("throughput of a task without steps, queue filled before", drained, unit="tasks/s", at_least=0.5),
        ratio("the same with publishing, by one client at the same time", published, unit="tasks/s", at_least=0.5),
    ]


def settle(queue: str = "") -> None:
    """Let the worker note what it has delivered, so that this is not part of the next round."""
    if queue:
        project.app.control.cancel_consumer(queue, reply=True, limit=1)
    time.sleep(0.5)
