"""Durable execution inside the Celery you already have."""

from celery_durable.app import Durable
from celery_durable.errors import (
    Abort,
    ConflictError,
    DivergenceError,
    DurableError,
    PayloadError,
    RunCancelled,
    RunFailed,
    StoreUnavailable,
    WaitTimeout,
)
from celery_durable.handle import RunHandle
from celery_durable.retry import RetryPolicy
from celery_durable.task import DurableTask, durable_task
from celery_durable.workflow import current_run, now, patched, random, sleep, sleep_until, step, uuid4

__all__ = [
    "Abort",
    "ConflictError",
    "DivergenceError",
    "Durable",
    "DurableError",
    "DurableTask",
    "PayloadError",
    "RetryPolicy",
    "RunCancelled",
    "RunFailed",
    "RunHandle",
    "StoreUnavailable",
    "WaitTimeout",
    "current_run",
    "durable_task",
    "now",
    "patched",
    "random",
    "sleep",
    "sleep_until",
    "step",
    "uuid4",
]
