"""How long a run is idle after `kill -9` of the pool process, or of the whole worker, that executed it."""

import os
import signal
import time
import uuid

from tests.benchmarks import project
from tests.benchmarks.report import Result, bound
from tests.benchmarks.setting import Setting, kill, wait_until


def measure(setting: Setting) -> list[Result]:
    lease = project.durable.settings.lease.total_seconds()
    with setting.worker():
        children = [lost_child() for _ in range(2 if setting.is_quick else 7)]
    workers = [lost_worker(setting) for _ in range(1 if setting.is_quick else 3)]
    return [
        bound("kill -9 of a pool process to the next claim", children, at_most=2, unit="s"),
        bound(f"kill -9 of a worker to the claim by another, lease {lease:g} s", workers, at_most=lease + 2, unit="s"),
    ]


def lost_child() -> float:
    key = begin()
    os.kill(int(holder(key)[1]), signal.SIGKILL)
    idle = until_taken_up(key)
    time.sleep(6)  # the pool looks every 5 seconds whether it has to make a new process
    return idle


def lost_worker(setting: Setting) -> float:
    with setting.worker() as one, setting.worker() as other:
        key = begin()
        main = int(holder(key)[0])
        time.sleep(uuid.uuid4().int % 5)  # anywhere between two renewals of the lease
        kill(one if one.pid == main else other)
        return until_taken_up(key)


def begin() -> str:
    key = str(uuid.uuid4())
    project.hold.delay(key)
    wait_until(lambda: project.notes.llen(key), 30, what="the first claim")
    return key


def holder(key: str) -> list[str]:
    """Return the process ids of the worker and of its pool's process that took the run first."""
    return str(project.notes.lindex(key, 0).decode()).split()


def until_taken_up(key: str) -> float:
    return wait_until(lambda: project.notes.llen(key) == 2, 60, what="the second claim")
