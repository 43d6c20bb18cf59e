"""The shop: a Celery app with one durable task.

Everything it needs lies in the directory SHOP_HOME (default `.shop`). By hand:

    celery -A example_project.shop durable migrate
    celery -A example_project.shop worker -c 2
"""

import os
import time
from pathlib import Path

from celery import Celery
from pydantic import BaseModel

from celery_durable import Durable, RetryPolicy, current_run, durable_task, sleep, step
from celery_durable.contrib import embedded
from example_project.payments import PaymentProvider

HOME = Path(os.environ.get("SHOP_HOME", ".shop"))
COOLING_OFF_SECONDS = 4

app = Celery("shop")
app.conf.update(embedded.settings(HOME), durable_lease=2, durable_sweep_interval=0.5)
durable = Durable(app)
provider = PaymentProvider(HOME / "payments.jsonl")


class OrderItem(BaseModel):
    sku: str
    name: str
    quantity: int
    unit_price_cents: int


class Order(BaseModel):
    id: str
    customer: str
    email: str
    currency: str
    items: list[OrderItem]

    @property
    def total_cents(self) -> int:
        return sum(item.quantity * item.unit_price_cents for item in self.items)


class Receipt(BaseModel):
    order_id: str
    charge_id: str
    total_cents: int
    currency: str
    parcels: list[str]


@step
def reserve_stock(order: Order) -> int:
    executed(order.id, "reserve_stock")
    time.sleep(0.15 * len(order.items))
    return sum(item.quantity for item in order.items)


@step(retry=RetryPolicy(max_attempts=3))
def charge(order: Order) -> str:
    executed(order.id, "charge")
    # The same key whenever this step of this run is executed, so that the provider knows a repetition.
    return provider.charge(
        order_id=order.id,
        cents=order.total_cents,
        currency=order.currency,
        idempotency_key=current_run().idempotency_key(),
    )


@step
def pack_item(order_id: str, item: OrderItem) -> str:
    executed(order_id, "pack_item", item.sku)
    time.sleep(0.2)
    return f"{order_id}/{item.sku} x{item.quantity}"


@step
def send_receipt(order: Order, charge_id: str) -> None:
    executed(order.id, "send_receipt")
    time.sleep(0.1)


@durable_task
def process_order(order: Order) -> Receipt:
    reserve_stock(order)
    charge_id = charge(order)
    sleep(COOLING_OFF_SECONDS)  # the customer may still change their mind; no worker is held meanwhile
    parcels = [pack_item(order.id, item) for item in order.items]
    send_receipt(order, charge_id)
    return Receipt(
        order_id=order.id,
        charge_id=charge_id,
        total_cents=order.total_cents,
        currency=order.currency,
        parcels=parcels,
    )


def executed(*words: str) -> None:
    """Note that a step's code runs, so that the demo can count how often each one did."""
    with (HOME / "executions.log").open("a") as log:
        log.write(" ".join(words) + "\n")
