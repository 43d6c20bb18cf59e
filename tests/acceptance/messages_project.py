"""The tasks of `test_messages`, in the app of `project`: what they see of their message, they return."""

import json
import os
import time
from typing import Any

from celery import chain
from celery.exceptions import Ignore, Reject

from celery_durable import DurableTask, RetryPolicy, sleep, step
from tests.acceptance.project import app, double, naps, note

#: Longer than `durable_inline_delay` of these tests, so that every one suspends.
NAP = 0.3

#: What differs from one delivery of a message to the next, for a plain task too.
OF_ONE_DELIVERY = {"called_directly", "_protected", "children", "delivery_info", "properties", "durable_context"}

ONCE = RetryPolicy.none()


def described(request: Any) -> dict[str, Any]:
    """Return what a task sees of its message, as JSON would give it back."""
    seen = {name: value for name, value in vars(request).items() if name not in OF_ONE_DELIVERY}
    routed = {name: request.delivery_info.get(name) for name in ("exchange", "routing_key", "priority")}
    return dict(json.loads(json.dumps({**seen, **routed}, default=repr)))


@app.task(bind=True, base=DurableTask)
def dump(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Return the message as it was before a suspension and as it is after."""
    before = step(lambda: described(self.request), name="before")()
    sleep(NAP)
    return [before, described(self.request)]


@app.task(bind=True)
def plain_dump(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return described(self.request)


@app.task(bind=True)
def lineage(self: Any, _: Any) -> list[str]:
    return [self.request.root_id, self.request.parent_id]


@app.task
def told(value: Any, mark: str) -> Any:
    """Note that a callback came, under the mark of its test, and pass the value on."""
    note("told", mark, json.dumps(value))
    return value


@app.task
def failed(request: Any, error: Any, traceback: Any) -> None:
    note("failed", request.id, type(error).__name__, error)


@app.task(base=DurableTask)
def total(numbers: list[int], nap: float = NAP) -> int:
    """Sum up after a nap."""
    sleep(nap)
    return sum(numbers)


@app.task(base=DurableTask, retry=ONCE)
def breaks(*_: Any) -> None:
    """Fail for good after a nap."""
    sleep(NAP)
    raise LookupError("broken")


@app.task(base=DurableTask)
def long_nap(*_: Any) -> str:
    sleep(600)
    return "awake"


class Unready(Exception):
    """What the tasks below fail with until they do not."""


@app.task(
    bind=True,
    base=DurableTask,
    autoretry_for=(Unready,),
    retry_backoff=False,
    retry_kwargs={"max_retries": 2, "countdown": NAP},
)
def recovers(self: Any, number: int, failures: int) -> list[int]:
    """Fail so often, then return; Celery's autoretry tries again, twice at most."""
    doubled = double(number)
    note("attempt", self.request.id)
    if self.request.retries < failures:
        raise Unready(f"after {self.request.retries}")
    return [doubled, self.request.retries]


@app.task(bind=True, base=DurableTask, retry=ONCE)
def asks_again(self: Any, number: int, label: str = "first", changed: bool = False) -> list[Any]:
    """Ask for a retry once, with other keyword arguments or the same."""
    doubled = double(number)
    if self.request.retries == 0:
        raise self.retry(countdown=NAP, kwargs={"label": "second"} if changed else None)
    sleep(NAP)
    return [doubled, number, label, self.request.retries]


@app.task(bind=True, base=DurableTask, retry=ONCE)
def asks_elsewhere(self: Any) -> dict[str, Any]:
    """Ask once for a retry that is sent in another way, nap, and return the message that came of it."""
    if self.request.retries == 0:
        raise self.retry(countdown=NAP, queue="side", priority=4, headers={"trace": "second"}, soft_time_limit=33)
    sleep(NAP)
    return described(self.request)


@app.task(bind=True, base=DurableTask, retry=ONCE, max_retries=1)
def asks_forever(self: Any) -> None:
    note("attempt", self.request.id)
    self.retry(countdown=NAP, exc=Unready("still"))


@app.task(bind=True, base=DurableTask, retry=ONCE)
def becomes(self: Any, number: int, durable: bool) -> None:
    """Nap, then leave the rest to another task."""
    sleep(NAP)
    rest = chain(naps.s(number, nap=NAP), plain_add.s(1)) if durable else plain_add.s(number, 1)
    raise self.replace(rest)


@app.task
def plain_add(*numbers: int) -> int:
    return sum(numbers)


@app.task(bind=True)
def plain_becomes(self: Any, number: int) -> None:
    raise self.replace(naps.s(number, nap=NAP))


@app.task(base=DurableTask, ignore_result=True)
def silent(number: int) -> int:
    sleep(NAP)
    note("silent", number)
    return number


@app.task(base=DurableTask, retry=ONCE)
def busy(seconds: float, nap: float = NAP) -> str:
    """Nap, then work in the body for so long."""
    sleep(nap)
    note("busy", os.getpid())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
    return "done"


@app.task(base=DurableTask)
def half_time(seconds: float) -> str:
    """Work twice for so long, with a nap between."""

    def work() -> None:
        time.sleep(seconds)

    step(work, name="first half")()
    sleep(NAP)
    step(work, name="second half")()
    return "done"


@app.task(base=DurableTask, bind=True)
def gives_up(self: Any, rejected: bool) -> None:
    """Nap, then speak to Celery in its own words."""
    sleep(NAP)
    note("gave-up", self.request.id)
    raise Reject("not here", requeue=False) if rejected else Ignore("nothing to do")
