"""The app of the crash matrix: one workflow with every kind of step, and a worker that kills itself.

With TEST_CRASH_POINTS in the environment each boundary at which the worker has done, or is about to do,
something for the run becomes a line of that file. With TEST_CRASH_AT=k as well, the process that
reaches the k-th line dies there with its whole worker; with TEST_CRASH_WHOM=child only boundaries of
the pool's process count and it dies alone.
"""

import functools
import importlib
import os
import signal
import sqlite3
from collections.abc import Mapping
from typing import Any

import psycopg
import sqlalchemy as sa
from kombu.message import Message
from kombu.messaging import Producer

from celery_durable import DurableTask, RetryPolicy, current_run, sleep, step
from tests.acceptance.project import LEDGER, app, note

RUN_ID = os.environ.get("TEST_RUN_ID", "the-run")
SIDE_TABLE = LEDGER.with_name("side.db")
_LINE = 100

__all__ = ["app"]


@step
def plain(number: int) -> int:
    note("plain")
    return number + 1


@step(retry=RetryPolicy.fixed(0.2, max_attempts=3))
def retried(number: int) -> int:
    if not any(line == "retried failed" for line in LEDGER.read_text().splitlines()):
        note("retried", "failed")
        raise ConnectionError("not yet")
    note("retried", "done")
    return number + 2


@step
def transactional(number: int) -> int:
    note("transactional")
    with sqlite3.connect(SIDE_TABLE, isolation_level=None) as side:
        side.execute("CREATE TABLE IF NOT EXISTS side (key TEXT PRIMARY KEY)")
        side.execute("INSERT OR IGNORE INTO side VALUES (?)", [current_run().idempotency_key()])
    side.close()
    return number + 30


@step
def inner(number: int) -> int:
    note("inner")
    return number + 200


@step
def outer(number: int) -> int:
    note("outer")
    return inner(number)


@step
def final(number: int) -> int:
    note("final")
    return number + 1000


@app.task(base=DurableTask)
def workflow() -> int:
    number = plain(0)
    number = retried(number)
    sleep(0.2)
    number = transactional(number)
    number = outer(number)
    return final(number) + 1


@app.task
def linked(result: int) -> None:
    note("linked", result)


@app.task
def successor(result: int) -> None:
    note("successor", result)


# -- where the worker dies -----------------------------------------------------------------------------


def point(label: str) -> None:
    """Count a boundary, and die if it is the chosen one."""
    is_child_only = os.environ.get("TEST_CRASH_WHOM") == "child"
    if is_child_only and _where() != "child":
        return
    file = os.open(os.environ["TEST_CRASH_POINTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, label[: _LINE - 1].ljust(_LINE - 1).encode() + b"\n")
    count = os.lseek(file, 0, os.SEEK_CUR) // _LINE
    os.close(file)
    if count == int(os.environ.get("TEST_CRASH_AT", "0")):
        if is_child_only:
            os.kill(os.getpid(), signal.SIGKILL)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _where() -> str:
    return "main" if os.getpid() == os.getpgrp() else "child"


def _summary(statement: str, values: Mapping[str, Any]) -> str:
    """Name a statement by what it does, so that a failing point can be read."""
    words = " ".join(statement.split())
    verb = next((v for v in ("INSERT INTO", "UPDATE", "DELETE FROM", "SELECT") if v in words), "?")
    table = words.partition(verb if verb != "SELECT" else " FROM ")[2].split()[:1]
    what = [str(values[name]) for name in ("state", "p_key", "p_step_state") if name in values]
    return " ".join([verb, *table, *what])


def _values(context: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = (getattr(context, "compiled_parameters", None) or [{}])[0]
    return values


def _concerns_the_run(values: Any) -> bool:
    # Leases are renewed by the clock, so those statements come as often as the machine is slow.
    return RUN_ID in repr(values) and not {"p_ids", "p_lease"} <= set(values)


def _before_execute(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
    if _concerns_the_run(_values(context)):
        point(f"{_where()} before {_summary(statement, _values(context))}")


def _after_execute(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
    if _concerns_the_run(_values(context)):
        conn.info["touched"] = _summary(statement, _values(context))
        point(f"{_where()} after {conn.info['touched']}")


def _sent_to_driver(conn: Any, statement: Any, values: Any = None, **_: Any) -> str | None:
    """Name a statement that goes past SQLAlchemy; its cursors do not come this way."""
    return _summary(str(statement), values) if values and _concerns_the_run(values) else None


def _before_commit(conn: Any) -> None:
    if "touched" in conn.info:
        conn.info["committed"] = conn.info.pop("touched")
        point(f"{_where()} before commit of {conn.info['committed']}")


def _after_transaction(connection: Any, record: Any) -> None:
    record.info.pop("touched", None)
    committed = record.info.pop("committed", None)
    if committed is not None:
        point(f"{_where()} after commit of {committed}")


def _around(owner: Any, name: str, verb: str, concerns: Any) -> None:
    known = getattr(owner, name)

    @functools.wraps(known)
    def wrapped(*args: Any, **options: Any) -> Any:
        about = concerns(*args, **options)
        if not about:
            return known(*args, **options)
        point(f"{_where()} before {verb} {about}")
        answer = known(*args, **options)
        point(f"{_where()} after {verb} {about}")
        return answer

    setattr(owner, name, wrapped)


def _message(message: Any, *_: Any, **__: Any) -> str | None:
    return "the run" if message.headers.get("id") == RUN_ID else None


def _published(producer: Any, body: Any, *_: Any, **options: Any) -> str | None:
    headers = options.get("headers") or {}
    mine = headers.get("id") == RUN_ID or headers.get("root_id") == RUN_ID or headers.get("parent_id") == RUN_ID
    return str(headers.get("task")).rpartition(".")[2] if mine else None


def _stored(backend: Any, task_id: str, result: Any, state: str, *_: Any, **__: Any) -> str | None:
    return state if task_id == RUN_ID else None


def install() -> None:
    """Make every boundary of the run a point."""
    sa.event.listen(sa.engine.Engine, "before_cursor_execute", _before_execute)
    sa.event.listen(sa.engine.Engine, "after_cursor_execute", _after_execute)
    sa.event.listen(sa.engine.Engine, "commit", _before_commit)
    sa.event.listen(sa.pool.Pool, "checkin", _after_transaction)
    _around(psycopg.Connection, "execute", "driver's", _sent_to_driver)
    _around(Message, "ack", "ack of", _message)
    _around(Message, "reject", "reject of", _message)
    _around(Producer, "publish", "sending", _published)
    _around(type(app.backend), "store_result", "storing", _stored)


def begin() -> None:
    """Store and send the run, with a callback and a successor."""
    head = workflow.s().set(task_id=RUN_ID, link=linked.s())
    (head | successor.s()).apply_async()


if "TEST_CRASH_POINTS" in os.environ:
    install()
if __name__ == "__main__":
    # By its name, so that the tasks are called as the workers call them.
    importlib.import_module("tests.acceptance.crash_project").begin()
