"""What the demo knows about its orders, from the store, the ledger and the log of executions."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from celery_durable import RunHandle
from example_project import shop
from example_project.shop import Order


@dataclass(frozen=True)
class Line:
    """One step or wait of an order, as it stands."""

    key: str
    label: str
    state: str
    is_recorded: bool
    executions: int


@dataclass
class Story:
    """The orders, their runs, and what was recorded or under way when the worker was killed."""

    orders: list[Order]
    handles: dict[str, RunHandle] = field(default_factory=dict)
    recorded: set[tuple[str, str]] = field(default_factory=set)
    interrupted: set[tuple[str, str]] = field(default_factory=set)

    def place_orders(self) -> None:
        for order in self.orders:
            self.handles[order.id] = shop.process_order.delay(order)

    def look(self) -> dict[str, list[Line]]:
        """Return the lines of each order."""
        counts = executions()
        return {order.id: self._lines(order, counts) for order in self.orders}

    def remember_the_crash(self) -> None:
        """Note what was recorded and what was under way, now that the worker is dead."""
        for order_id, lines in self.look().items():
            self.recorded |= {(order_id, line.key) for line in lines if line.is_recorded}
            self.interrupted |= {(order_id, line.key) for line in lines if line.executions and not line.is_recorded}

    def is_in_the_middle(self) -> bool:
        """Return whether two orders are paid, and for another money has moved that the shop knows nothing of."""
        charges = {order_id: lines[1] for order_id, lines in self.look().items()}
        paid = {order_id for order_id, line in charges.items() if line.is_recorded}
        return len(paid) >= 2 and bool(moved().keys() - paid)

    def is_over(self) -> bool:
        return all(handle.run.finished_at for handle in self.handles.values())

    def problems(self) -> list[str]:
        """Return what is not as it must be."""
        counts, asked, charged = executions(), requested(), moved()
        found = [] if any(key == "charge" for _, key in self.interrupted) else ["the kill hit no charge"]
        for order in self.orders:
            if charged[order.id] != 1:
                found.append(f"order {order.id} was charged {charged[order.id]} times")
            for key, label in plan(order):
                wanted = 2 if (order.id, key) in self.interrupted else 1
                count = counts[f"{order.id} {label}"]
                if key != "sleep" and count != wanted:
                    found.append(f"{label} of order {order.id} was executed {count} times, not {wanted}")
                if key == "charge" and asked[order.id] != wanted:
                    found.append(f"order {order.id} asked for {asked[order.id]} charges, not {wanted}")
        return found

    def _lines(self, order: Order, counts: Counter[str]) -> list[Line]:
        # The records before the run: its timer, if it still has one, is then that of the last record.
        records = {record.key for record in self.handles[order.id].steps}
        wake_at = self.handles[order.id].run.wake_at
        lines = []
        for key, label in plan(order):
            count = counts[f"{order.id} {label}"]
            state = self._state((order.id, key), count, wake_at, is_recorded=key in records)
            lines.append(Line(key, label, state, key in records, count))
        return lines

    def _state(self, key: tuple[str, str], count: int, wake_at: datetime | None, *, is_recorded: bool) -> str:
        is_wait = key[1] == "sleep"
        if is_wait and is_recorded and wake_at is not None:
            return f"{max(0.0, (wake_at - datetime.now(UTC)).total_seconds()):.1f} s left"
        if is_recorded:
            return "kept" if key in self.recorded else "waited" if is_wait else "ran again" if count > 1 else "ran"
        if key in self.interrupted:
            return "cut off" if count == 1 else "runs again"
        return "runs" if count else ""


def plan(order: Order) -> list[tuple[str, str]]:
    """Return the key and the label of everything that an order's run records, in order."""
    packing = [
        ("pack_item" if number == 1 else f"pack_item#{number}", f"pack_item {item.sku}")
        for number, item in enumerate(order.items, start=1)
    ]
    first = [("reserve_stock", "reserve_stock"), ("charge", "charge"), ("sleep", "sleep")]
    return [*first, *packing, ("send_receipt", "send_receipt")]


def executions() -> Counter[str]:
    """Return how often the code of each step was begun."""
    log = shop.HOME / "executions.log"
    return Counter(log.read_text().splitlines() if log.exists() else [])


def requested() -> Counter[str]:
    """Return how many charges the payment provider was asked for, for each order."""
    return Counter(entry["order"] for entry in shop.provider.entries("requested"))


def moved() -> Counter[str]:
    """Return how often the payment provider moved money, for each order."""
    return Counter(entry["order"] for entry in shop.provider.entries("moved"))
