"""The schema: seven tables.

`durable_run` is the only row that changes; it is narrow, and what is written once (the message, the
outcome) lies beside it. `due_at` says when the sweeper must look at the run next, whatever its
state, so one partial index serves timers, lost messages, lost leases and undelivered results alike.
No foreign keys: every dependent row is inserted by a statement that selects from the run it belongs to.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
)

from celery_durable.states import RunState
from celery_durable.store.expressions import Instant, now

metadata = MetaData()

run = Table(
    "durable_run",
    metadata,
    Column("id", Text, primary_key=True),
    Column("task", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("attempt", Integer, nullable=False, server_default="1"),
    Column("first_attempt", Integer, nullable=False, server_default="1"),
    Column("due_at", Instant),
    Column("worker", Text),
    Column("process", Integer),
    Column("sends", SmallInteger, nullable=False, server_default="0"),
    Column("crashes", SmallInteger, nullable=False, server_default="0"),
    Column("crash_mark", Integer, nullable=False, server_default="0"),
    Column("cancel_requested", Boolean, nullable=False, server_default="0"),
    Column("wait", Text),
    Column("error_code", Text),
    Column("queue", Text),
    Column("version", Text),
    Column("created_at", Instant, nullable=False, server_default=now()),
    Column("started_at", Instant),
    Column("finished_at", Instant),
    CheckConstraint(f"state IN ({', '.join(repr(str(s)) for s in RunState)})", name="durable_run_state"),
)
Index("durable_run_created", run.c.created_at)
Index(
    "durable_run_due", run.c.due_at, postgresql_where=run.c.due_at.is_not(None), sqlite_where=run.c.due_at.is_not(None)
)

message = Table(
    "durable_message",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("envelope", Text, nullable=False),
    Column("group_id", Text),
    Column("parent_id", Text),
    Column("root_id", Text),
    Column("tags", Text),
    Column("idempotency_key", Text),
)

idempotency = Table(
    "durable_idempotency",
    metadata,
    Column("key", Text, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("expires_at", Instant, nullable=False),
)
Index("durable_idempotency_expires", idempotency.c.expires_at)

outcome = Table(
    "durable_outcome",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("result", Text),
    Column("error", Text),
)

step = Table(
    "durable_step",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", SmallInteger, nullable=False),
    Column("run_attempt", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("output", Text),
    Column("error", Text),
    Column("fingerprint", Text),
    Column("version", Text),
    Column("wake_at", Instant),
    Column("started_at", Instant, nullable=False),
    Column("finished_at", Instant),
)

history = Table(
    "durable_history",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("run_id", Text, nullable=False),
    Column("at", Instant, nullable=False, server_default=now()),
    Column("what", Text, nullable=False),
    Column("who", Text),
    Column("why", Text),
    Column("epoch", Integer, nullable=False),
    Column("version", Text),
)
Index("durable_history_run", history.c.run_id)

worker = Table(
    "durable_worker",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("started_at", Instant, nullable=False, server_default=now()),
    Column("seen_until", Instant, nullable=False),
)
