"""One activation of a run: call the body and say what it came to.

Whatever the body raises or returns, once it was told to stop the answer is that it stopped.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery_durable.codec import Codec, text_of
from celery_durable.engine.context import Context, activated
from celery_durable.engine.outcome import Cancelled, Completed, Failed, Outcome, Suspend, Suspended
from celery_durable.errors import DurableError, PayloadError, RunCancelled, StoreUnavailable


def execute(context: Context, body: Callable[[], Any], result: Codec) -> Outcome:
    """Call `body` as the run of `context`; errors named in the rules' `control` go through."""
    try:
        with activated(context):
            returned = body()
        if context.ended is None:
            context.finish_journal()
            text = result.dump(returned, context.rules.max_payload)
    except Suspend:
        pass
    except context.rules.control:
        if context.ended is None:
            raise
    except RunCancelled as error:
        if context.ended is None:
            return Cancelled(error)
    except Exception as error:
        if context.ended is None:
            return _decide(context, error)
    if context.ended is not None:
        return context.ended
    return Completed(text, json.loads(text))


def _decide(context: Context, error: Exception) -> Outcome:
    if isinstance(error, StoreUnavailable):
        why = f"the store did not answer: {error}"
        return Suspended(move="back_off", why=why, due_in=timedelta(seconds=1), error=error)
    delay = (
        None if isinstance(error, PayloadError) else context.rules.retry.next_delay(context.attempt_of_budget, error)
    )
    if delay is None:
        return Failed(error, _code_of(context, error))
    why = f"attempt {context.attempt} failed: {type(error).__name__}: {text_of(error)}"
    return Suspended(move="back_off", why=why, due_in=delay, error=error, next_attempt=True)


def _code_of(context: Context, error: Exception) -> str:
    if isinstance(error, context.rules.timeouts):
        return "timeout"
    return error.code if isinstance(error, DurableError) else "exception"
