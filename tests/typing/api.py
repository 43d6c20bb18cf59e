"""User code that must type-check: decorators keep signatures, values keep their types."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import assert_type
from uuid import UUID

from celery import Celery

from celery_durable import (
    Abort,
    Durable,
    RetryPolicy,
    RunHandle,
    current_run,
    durable_task,
    now,
    patched,
    random,
    sleep,
    sleep_until,
    step,
    uuid4,
)

app = Celery("shop")
durable = Durable(app, store_url="sqlite:///shop.db", lease=30)


@dataclass
class Receipt:
    charge_id: str
    cents: int


@step
def charge(order_id: str, cents: int) -> str:
    return f"{order_id}/{cents}/{current_run().idempotency_key()}"


@step(name="ship", retry=RetryPolicy(max_attempts=5, factor=2, min_delay=1, max_delay=60, give_up_on=(Abort,)))
def send_parcel(order_id: str, *, express: bool = False) -> Receipt:
    return Receipt(order_id, 0)


def lookup(order_id: int) -> list[int]:
    return [order_id]


@durable_task
def process_order(order_id: str, cents: int = 0) -> Receipt:
    assert_type(charge(order_id, cents), str)
    assert_type(send_parcel(order_id, express=True), Receipt)
    assert_type(step(lookup, name="lookup")(3), list[int])
    assert_type(step(lookup)(order_id=3), list[int])
    charge(order_id)  # type: ignore[call-arg]
    charge(order_id, "12")  # type: ignore[arg-type]
    send_parcel(order_id, True)  # type: ignore[call-arg]
    step(lookup)("3")  # type: ignore[arg-type]
    sleep(5)
    sleep(0.5)
    sleep(timedelta(hours=1))
    sleep("soon")  # type: ignore[arg-type]
    sleep_until(now() + timedelta(days=1))
    assert_type(now(), datetime)
    assert_type(uuid4(), UUID)
    assert_type(random(), float)
    assert_type(patched("new-tax"), bool)
    run = current_run()
    assert_type(run.id, str)
    assert_type(run.attempt, int)
    assert_type(run.idempotency_key("run"), str)
    return Receipt(charge(order_id, cents), cents)


@durable_task(name="shop.refund", retry=RetryPolicy.fixed(5), on_divergence="fail", queue="slow")
def refund(order_id: str) -> None:
    charge(order_id, -1)


def start() -> None:
    handle: RunHandle = process_order.delay("o-1", 100)
    handle = process_order.apply_async(("o-1",), {"cents": 3}, countdown=60, tags=["vip"])
    handle = refund.s("o-1").apply_async()
    assert_type(handle.cancel("no longer wanted"), bool)
    assert_type(handle.run.attempt, int)
    assert_type(handle.run.tags, tuple[str, ...])
    for record in handle.steps:
        assert_type(record.key, str)
    for entry in handle.history:
        assert_type(entry.why, str | None)
    assert_type(durable.runs.cancel(handle.run.id), bool)
    assert_type(durable.runs.retry("run", why="the bug is fixed"), bool)
    assert_type(process_order("o-1", cents=3), Receipt)


def policies() -> list[RetryPolicy]:
    def later(attempt: int, error: BaseException) -> float | None:
        return None if isinstance(error, KeyError) else attempt * 2.0

    return [
        RetryPolicy(delay=later, retry_on=(OSError, KeyError)),
        RetryPolicy.fixed(5, max_attempts=9),
        RetryPolicy.linear(5),
        RetryPolicy.exponential(0.5, jitter=False),
        RetryPolicy.from_celery({"autoretry_for": (OSError,)}),
        RetryPolicy.none(),
    ]
