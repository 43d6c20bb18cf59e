"""Celery signals that tell of runs and steps; the sender is the task.

They are sent in the process that executes the body, after the store has committed.
"""

from celery.utils.dispatch import Signal

#: A run was claimed for the first time; `run_id`.
run_started = Signal(name="run_started", providing_args={"run_id"})
#: A run waits; `run_id`, `reason`.
run_suspended = Signal(name="run_suspended", providing_args={"run_id", "reason"})
#: A run was claimed again; `run_id`.
run_resumed = Signal(name="run_resumed", providing_args={"run_id"})
#: An attempt failed and another follows; `run_id`, `exception`.
run_retrying = Signal(name="run_retrying", providing_args={"run_id", "exception"})
#: A run returned; `run_id`, `result`.
run_succeeded = Signal(name="run_succeeded", providing_args={"run_id", "result"})
#: A run failed for good; `run_id`, `exception`, `code`.
run_failed = Signal(name="run_failed", providing_args={"run_id", "exception", "code"})
#: A run was cancelled; `run_id`.
run_cancelled = Signal(name="run_cancelled", providing_args={"run_id"})
#: A step was recorded; `run_id`, `key`, `attempts`.
step_finished = Signal(name="step_finished", providing_args={"run_id", "key", "attempts"})
#: An attempt of a step failed; `run_id`, `key`, `attempts`, `will_retry`.
step_failed = Signal(name="step_failed", providing_args={"run_id", "key", "attempts", "will_retry"})
