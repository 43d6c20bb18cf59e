"""Kills a worker in the middle of a payment and shows what that costs: nothing.

Run it with `python -m example_project.demo`. It places the orders of `orders/`, kills the worker with -9
while customers are being charged, starts it again and counts. The exit code is 0 only if the count is right.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = Path(tempfile.mkdtemp(prefix="celery-durable-demo-"))
os.environ["SHOP_HOME"] = str(HOME)  # the shop reads it when it is imported

from example_project import shop  # noqa: E402
from example_project.screen import Screen  # noqa: E402
from example_project.story import Story, moved, requested  # noqa: E402

TIMEOUT = 60.0
LOOK_EVERY = 0.1
# If the demo itself dies, in whatever way, its worker and its files go too.
GUARD = """
import os, shutil, signal, sys, time
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.1)
try:
    os.killpg(int(sys.argv[2]), signal.SIGKILL)
except ProcessLookupError:
    pass
shutil.rmtree(sys.argv[3], ignore_errors=True)
"""


class Worker:
    """A `celery worker` with two processes, in a process group of its own."""

    command = ("celery", "-A", "example_project.shop", "worker", "-c", "2")

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CELERY")}
        environment["TMPDIR"] = str(HOME)  # a process that is killed leaves its temporary files behind
        with (HOME / "worker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command, "-l", "INFO"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        guard = [sys.executable, "-IS", "-c", GUARD, str(os.getpid()), str(self._process.pid), str(HOME)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.DEVNULL, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.wait()
        self._guard.kill()
        self._guard.wait()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the worker ended by itself with code {self._process.returncode}")


def main() -> int:
    """Tell the story and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    is_kept = False
    try:
        files = sorted((Path(__file__).parent / "orders").glob("*.json"))
        story = Story([shop.Order.model_validate_json(file.read_bytes()) for file in files])
        screen = Screen(story.orders)
        act(story, screen)
        is_kept = bool(story.problems())
        return report(story, screen)
    except KeyboardInterrupt:
        print("\nstopped; the worker is gone too", file=sys.stderr)
        return 130
    except Exception:
        is_kept = True
        raise
    finally:
        if is_kept:
            print(f"this should not have happened; see {HOME / 'worker.log'}", file=sys.stderr)
        else:
            shutil.rmtree(HOME, ignore_errors=True)


def act(story: Story, screen: Screen) -> None:
    """Place the orders, kill the worker in the middle of charges, start it again, wait for the end."""
    shop.durable.migrate()
    story.place_orders()
    worker = Worker()
    try:
        with screen:
            screen.say(f"{len(story.orders)} orders are placed. $ {' '.join(worker.command)}")
            watch(story, screen, worker, until=lambda: is_caught(story, worker))
            worker.kill()
            story.remember_the_crash()
            screen.say(f"[bold red]kill -9[/] of the worker and its processes, in the middle of {what_was_hit(story)}")
            screen.show(story.look())
            time.sleep(1.5)  # for the audience
            worker = Worker()
            screen.say("The worker is [bold]started again[/]. What was done is in the store.")
            watch(story, screen, worker, until=story.is_over)
            screen.finish(story.look())
    finally:
        worker.kill()


def watch(story: Story, screen: Screen, worker: Worker, *, until: Callable[[], bool]) -> None:
    """Show how the orders go on until something holds."""
    end = time.monotonic() + TIMEOUT
    while not until():
        worker.check()
        if time.monotonic() > end:
            raise TimeoutError("the orders did not get on")
        screen.show(story.look())
        time.sleep(LOOK_EVERY)


def is_caught(story: Story, worker: Worker) -> bool:
    """Hold the worker still in the middle of a charge, and return whether that has come out well."""
    if not story.is_in_the_middle():
        return False
    worker.send(signal.SIGSTOP)  # or it would record the charge between this look and the kill
    if story.is_in_the_middle():
        return True
    worker.send(signal.SIGCONT)
    return False


def what_was_hit(story: Story) -> str:
    hit = sorted(order_id for order_id, key in story.interrupted if key == "charge")
    charged = [order_id for order_id in hit if moved()[order_id]]
    text = f"charging {' and '.join(hit)}."
    return f"{text} Money has moved for {' and '.join(charged)} and the shop does not know." if charged else text


def report(story: Story, screen: Screen) -> int:
    """Print the results and the ledger, say in words what they prove, and return the exit code."""
    asked, charged = requested(), moved()
    results, ledger = [], []
    for order in story.orders:
        handle = story.handles[order.id]
        receipt = handle.get(timeout=10)
        results.append((order.id, order.customer, str(len(receipt.parcels)), receipt.charge_id, handle.state))
        total = f"{receipt.total_cents / 100:,.2f} {receipt.currency}"
        ledger.append((order.id, order.customer, str(asked[order.id]), str(charged[order.id]), total))
    ledger.append(("", "all orders", str(asked.total()), str(charged.total()), ""))
    screen.table("Results", ("order", "customer", "parcels", "charge", "Celery's state"), results)
    screen.table(
        "The payment provider's ledger",
        ("order", "customer", "charges requested", "money moved", "amount"),
        ledger,
    )
    problems = story.problems()
    for problem in problems:
        screen.say(problem, title="[bold red]Wrong:[/]")
    if not problems:
        again = len(story.interrupted)
        screen.say(
            f"the worker died while it charged {again} customers, and each of the {len(story.orders)} orders was "
            f"charged exactly once. {len(story.recorded)} steps and waits were on record and were not run again; "
            f"only the {again} that were cut off ran a second time, under the same idempotency key.",
            title="[bold green]Proven:[/]",
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
