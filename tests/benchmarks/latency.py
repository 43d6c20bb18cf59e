"""From `apply_async` to the first step of a durable task, against a plain task's first line; the worker is idle."""

import statistics
import time
from typing import Any

from tests.benchmarks import project
from tests.benchmarks.report import Result, ratio
from tests.benchmarks.setting import Setting


def measure(setting: Setting) -> list[Result]:
    rounds, count = (7, 8) if setting.is_quick else (7, 30)
    with setting.worker():
        for _ in range(10):
            sample(project.first_step), sample(project.plain_moment)
        samples = [
            [(sample(project.first_step), sample(project.plain_moment)) for _ in range(count)] for _ in range(rounds)
        ]
    halves = [tuple(statistics.median(side) for side in zip(*part, strict=True)) for part in samples]
    ends = [tuple(nearly_highest(side) for side in zip(*part, strict=True)) for part in samples]
    return [
        ratio("start to first step, p50", halves, unit="ms", at_most=2, scale=1000),
        ratio("start to first step, p95", ends, unit="ms", scale=1000),
    ]


def sample(task: Any) -> float:
    began = time.monotonic()
    result = task.apply_async()
    reached = float(result.get(timeout=30))
    time.sleep(0.12)  # the worker is still to note that the outcome was delivered; then it is idle again
    return reached - began


def nearly_highest(values: tuple[float, ...]) -> float:
    return statistics.quantiles(values, n=20)[-1]
