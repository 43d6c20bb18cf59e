"""One delivery of a durable task's message, in the process that executes it.

Claim, execute, then tell Celery what came of it. What Celery has to store or send before the run may
move on is committed in the task's own hooks, so that a crash anywhere leaves the old state or the new.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, states
from celery.exceptions import Ignore, Reject, Retry

from celery_durable import signals
from celery_durable.codec import Signature, dump_error, load_error, text_of
from celery_durable.engine.context import Context, Rules
from celery_durable.engine.outcome import Cancelled, Completed, Failed, Lost, Outcome, Suspended
from celery_durable.engine.runner import execute
from celery_durable.errors import StoreUnavailable, Waiting
from celery_durable.messages import dispatch
from celery_durable.messages.envelope import MARK, Envelope
from celery_durable.retry import RetryPolicy
from celery_durable.runtime import Runtime
from celery_durable.states import TERMINAL, RunState, StepState
from celery_durable.store import runs
from celery_durable.store.database import Connection
from celery_durable.store.runs import Claim, NewRun
from celery_durable.store.steps import Record
from celery_durable.worker.request import CAPTURED

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What an activation needs of a durable task."""

    app: Celery
    name: str
    backend: Any
    request: Any
    run: Callable[..., Any]
    runtime: Runtime
    parameters: Signature
    policy: RetryPolicy
    code_version: str
    on_divergence: Any


def activate(task: Task, request: Any, args: Any, kwargs: Any) -> Any:
    """Execute the run of a message and return its result.

    Raises:
        Retry: when the run waits; the move is committed by `commit_suspension`.
        Ignore: when the message is stale, or the run is another worker's by now.
        Reject: when the store does not answer and this worker shuts down.
        Exception: what the body raised for good.
    """
    claim = _claim(task, request)
    if claim is None:
        raise Ignore(f"run {request.id} is not pending: a stale or repeated message")
    if claim.state in TERMINAL:
        return _deliver_again(task, request, claim)
    if task.app.conf.task_track_started and not request.ignore_result:
        task.backend.store_result(request.id, {"pid": os.getpid(), "hostname": request.hostname}, states.STARTED)
    context = Context(task.runtime.database, request.id, task.name, claim, _rules(task))
    request.durable_context = context
    (signals.run_started if claim.epoch == 1 else signals.run_resumed).send(sender=task, run_id=request.id)
    try:
        outcome = execute(context, _body(task, args, kwargs), task.parameters.result)
    except (Ignore, Reject, Retry) as asked:
        _obey(task, context, asked)
        raise
    return _tell_celery(task, request, context, outcome)


def commit_suspension(task: Task, request: Any) -> None:
    """Give the run up until its time, now that Celery has stored the state RETRY.

    Done earlier, the run could resume and end elsewhere before Celery wrote RETRY over its result.
    """
    context: Context | None = getattr(request, "durable_context", None)
    if context is None or not isinstance(context.ended, Suspended):
        return
    suspended = context.ended
    try:
        _commit(task, context, suspended)
    except Exception:
        # Raised from here, it would make Celery record a failure; the lease runs out and the run goes on.
        logger.exception("run %s could not be suspended; it is taken up again when its lease runs out", request.id)
        return
    if suspended.error is not None and suspended.next_attempt:
        signals.run_retrying.send(sender=task, run_id=request.id, exception=suspended.error)
    else:
        signals.run_suspended.send(sender=task, run_id=request.id, reason=suspended.why)


def run_eagerly(task: Task, request: Any, args: Any, kwargs: Any) -> Any:
    """Execute a run to its end in this process, waits included; its steps are recorded as ever.

    Raises:
        Exception: what the body raised for good.
    """
    database = task.runtime.database
    args, kwargs = task.parameters.dump(args, kwargs)
    new = NewRun(
        id=request.id,
        task=task.name,
        envelope=_eager_envelope(task, request, args, kwargs).to_text(),
        version=task.code_version,
        parent_id=request.parent_id,
        root_id=request.root_id,
    )
    while True:
        claim = database.once(
            lambda conn: runs.claim_or_store(
                conn, new, worker=task.runtime.worker, process=os.getpid(), lease=timedelta(days=1)
            )
        )
        if claim is None:
            raise Ignore(f"run {request.id} is not pending")
        context = Context(database, request.id, task.name, claim, _rules(task))
        outcome = execute(context, _body(task, args, kwargs), task.parameters.result)
        if not isinstance(outcome, Suspended):
            try:
                return _tell_celery(task, request, context, outcome)
            finally:
                database.once(lambda conn: runs.delivered(conn, [request.id], worker=task.runtime.worker))
        _commit(task, context, outcome)
        time.sleep(_seconds_until(outcome))
        database.once(lambda conn: runs.wake(conn, [request.id], resend=timedelta(days=1)))


def _claim(task: Task, request: Any) -> Claim | None:
    runtime = task.runtime
    owner: dict[str, Any] = {"worker": runtime.worker, "process": os.getpid(), "lease": runtime.settings.lease}

    def claim(conn: Connection) -> Claim | None:
        claimed = runs.claim(conn, request.id, version=task.code_version, **owner) if is_stored else None
        # A marked message whose run is gone: its task has replaced itself and died before it said so.
        if claimed is None and not (is_stored and runs.exists(conn, request.id)):
            claimed = runs.claim_or_store(conn, _as_received(task, request), **owner)
        return claimed

    is_stored = bool(request.properties[CAPTURED]["headers"].get(MARK))
    try:
        return runtime.database.patiently(claim, runtime.is_draining)
    except StoreUnavailable as error:
        raise Reject(str(error), requeue=True) from error


def _as_received(task: Task, request: Any) -> NewRun:
    """Return the run of a message that nobody stored."""
    envelope = Envelope.of_request(request.properties[CAPTURED], request)
    return NewRun(
        id=request.id,
        task=task.name,
        envelope=envelope.to_text(),
        queue=envelope.routing_key or None,
        version=task.code_version,
        group_id=request.group,
        parent_id=request.parent_id,
        root_id=request.root_id,
    )


def _body(task: Task, args: Any, kwargs: Any) -> Callable[[], Any]:
    def call() -> Any:
        positional, named = task.parameters.load(args, kwargs)
        return task.run(*positional, **named)

    return call


def _rules(task: Task) -> Rules:
    runtime = task.runtime

    def on_step(record: Record) -> None:
        signal = signals.step_finished if record.state is StepState.SUCCEEDED else signals.step_failed
        if not signal.receivers:
            return
        more = {} if record.state is StepState.SUCCEEDED else {"will_retry": record.state is StepState.RETRYING}
        signal.send(sender=task, run_id=task.request.id, key=record.key, attempts=record.attempts, **more)

    return Rules(
        retry=task.policy,
        inline_delay=runtime.settings.inline_delay,
        max_payload=runtime.settings.max_payload,
        on_divergence=task.on_divergence or runtime.settings.on_divergence,
        version=task.code_version,
        worker=runtime.worker,
        control=(Retry, Ignore, Reject),
        timeouts=(SoftTimeLimitExceeded,),
        is_draining=runtime.is_draining,
        on_step=on_step,
    )


def _tell_celery(task: Task, request: Any, context: Context, outcome: Outcome) -> Any:
    match outcome:
        case Completed(text, value):
            _finish(task, context, "succeed", result=text)
            signals.run_succeeded.send(sender=task, run_id=request.id, result=value)
            return value
        case Failed(error, code):
            why = f"{type(error).__name__}: {text_of(error)}"
            _finish(task, context, "fail", error=dump_error(error), error_code=code, why=why)
            signals.run_failed.send(sender=task, run_id=request.id, exception=error, code=code)
            raise error
        case Cancelled(error):
            _finish(task, context, "cancel", error=dump_error(error), why=str(error))
            _tell_revoked(task, request)
            raise Ignore(str(error)) from error
        case Suspended():
            reason = outcome.error or Waiting(outcome.why)
            raise Retry(message=outcome.why, exc=reason, when=_seconds_until(outcome)) from None
        case Lost():
            raise Ignore(f"run {request.id} is no longer held here under epoch {context.epoch}")


def _obey(task: Task, context: Context, asked: Ignore | Reject | Retry) -> None:
    """Move the run as a body asks that raised a word of Celery's itself."""
    match asked:
        case Retry():
            delay = timedelta(seconds=asked.when) if isinstance(asked.when, int | float) else None
            until = asked.when if isinstance(asked.when, datetime) else None
            why = f"the body raised {asked!r}"
            due_in = timedelta() if delay is None and until is None else delay
            context.stop(Suspended(move="back_off", why=why, due_in=due_in, due_at=until, next_attempt=True))
        case Reject() if asked.requeue:
            why = f"the body raised {asked!r}"
            _commit(task, context, Suspended(move="release", why=why), send=False)
        case Reject():
            _finish(
                task, context, "fail", error=dump_error(asked), error_code="abort", why=f"the body raised {asked!r}"
            )
        case Ignore():
            _finish(task, context, "cancel", error=dump_error(asked), why=f"the body raised {asked!r}")
            _note_delivered(task, context.run_id)


def _finish(task: Task, context: Context, move: str, **values: Any) -> None:
    runtime = task.runtime
    try:
        is_ours = runtime.database.patiently(
            lambda conn: runs.finish(
                conn,
                context.run_id,
                move,
                epoch=context.epoch,
                who=runtime.worker,
                lease=runtime.settings.lease,
                **values,
            ),
            runtime.is_draining,
        )
    except StoreUnavailable as error:
        raise Ignore(f"the outcome of run {context.run_id} could not be stored; its lease runs out") from error
    if not is_ours:
        raise Ignore(f"run {context.run_id} is no longer held here under epoch {context.epoch}")


def _deliver_again(task: Task, request: Any, claim: Claim) -> Any:
    """Hand an outcome to Celery whose first delivery may have been cut short."""
    database = task.runtime.database
    # Callbacks go out before the result is stored, so a stored result means that all is done.
    is_stored = claim.state is RunState.SUCCEEDED and not request.ignore_result
    if is_stored and task.backend.get_state(request.id) == states.SUCCESS:
        _note_delivered(task, request.id)
        raise Ignore(f"the result of run {request.id} is stored already")
    result, error = database.patiently(lambda conn: runs.outcome_of(conn, request.id))
    if claim.state is RunState.SUCCEEDED:
        return json.loads(result or "null")
    if claim.state is RunState.FAILED:
        raise load_error(error or "{}")
    _tell_revoked(task, request)
    raise Ignore(f"run {request.id} was {claim.state}")


def _tell_revoked(task: Task, request: Any) -> None:
    task.backend.mark_as_revoked(request.id, "cancelled", request=request, store_result=not request.ignore_result)
    signals.run_cancelled.send(sender=task, run_id=request.id)
    _note_delivered(task, request.id)


def _note_delivered(task: Task, run_id: str) -> None:
    runtime = task.runtime
    runtime.execute(lambda conn: runs.delivered(conn, [run_id], worker=runtime.worker))


def _commit(task: Task, context: Context, suspended: Suspended, *, send: bool = True) -> None:
    runtime = task.runtime
    is_release = suspended.move == "release"
    if (changed := suspended.envelope) is not None:
        runtime.execute(lambda conn: runs.replace_message(conn, context.run_id, changed))
    runtime.execute(
        lambda conn: runs.suspend(
            conn,
            context.run_id,
            suspended.move,
            epoch=context.epoch,
            who=runtime.worker,
            why=suspended.why,
            version=task.code_version,
            due_in=runtime.settings.sweep_interval if is_release else suspended.due_in,
            due_at=suspended.due_at,
            record=suspended.record,
            next_attempt=suspended.next_attempt,
        )
    )
    if is_release and send:
        dispatch.send_stored(task.app, runtime, [context.run_id])


def _seconds_until(suspended: Suspended) -> float:
    if suspended.due_at is not None:
        return max(0.0, (suspended.due_at - datetime.now(UTC)).total_seconds())
    return suspended.due_in.total_seconds() if suspended.due_in is not None else 0.0


def _eager_envelope(task: Task, request: Any, args: Any, kwargs: Any) -> Envelope:
    options = {"headers": {"id": request.id, "task": task.name}, "serializer": "json", "routing_key": "eager"}
    return Envelope.of_publish((args, kwargs, {}), options)
