"""The tables of runs, their messages, records, outcomes and history.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

from celery_durable.store.expressions import Instant, now

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "durable_history",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("at", Instant, nullable=False, server_default=now()),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("who", sa.Text),
        sa.Column("why", sa.Text),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("version", sa.Text),
    )
    op.create_index("durable_history_run", "durable_history", ["run_id"])
    op.create_table(
        "durable_message",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("envelope", sa.Text, nullable=False),
        sa.Column("group_id", sa.Text),
        sa.Column("parent_id", sa.Text),
        sa.Column("root_id", sa.Text),
        sa.Column("tags", sa.Text),
        sa.Column("idempotency_key", sa.Text),
    )
    op.create_table(
        "durable_idempotency",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("expires_at", Instant, nullable=False),
    )
    op.create_index("durable_idempotency_expires", "durable_idempotency", ["expires_at"])
    op.create_table(
        "durable_outcome",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
    )
    op.create_table(
        "durable_run",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="1"),
        sa.Column("first_attempt", sa.Integer, nullable=False, server_default="1"),
        sa.Column("due_at", Instant),
        sa.Column("worker", sa.Text),
        sa.Column("process", sa.Integer),
        sa.Column("sends", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("crashes", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("crash_mark", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default="0"),
        sa.Column("wait", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("queue", sa.Text),
        sa.Column("version", sa.Text),
        sa.Column("created_at", Instant, nullable=False, server_default=now()),
        sa.Column("started_at", Instant),
        sa.Column("finished_at", Instant),
        sa.CheckConstraint(
            "state IN ('pending', 'delayed', 'queued', 'running', 'waiting', 'retrying', "
            "'succeeded', 'failed', 'cancelled', 'expired')",
            name="durable_run_state",
        ),
    )
    op.create_index("durable_run_created", "durable_run", ["created_at"])
    op.create_index(
        "durable_run_due",
        "durable_run",
        ["due_at"],
        postgresql_where=sa.column("due_at").is_not(None),
        sqlite_where=sa.column("due_at").is_not(None),
    )
    op.create_table(
        "durable_step",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.SmallInteger, nullable=False),
        sa.Column("run_attempt", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("output", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("fingerprint", sa.Text),
        sa.Column("version", sa.Text),
        sa.Column("wake_at", Instant),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("finished_at", Instant),
    )
    op.create_table(
        "durable_worker",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("started_at", Instant, nullable=False, server_default=now()),
        sa.Column("seen_until", Instant, nullable=False),
    )
    if op.get_context().dialect.name == "postgresql":
        # Every run is moved a few times soon after its start; its new versions find room on its page.
        name = op.get_context().dialect.identifier_preparer.format_table(
            sa.table("durable_run", schema=op.get_context().version_table_schema)
        )
        op.execute(f"ALTER TABLE {name} SET (fillfactor = 80)")


def downgrade() -> None:
    op.drop_table("durable_idempotency")
    op.drop_table("durable_worker")
    op.drop_table("durable_step")
    op.drop_table("durable_run")
    op.drop_table("durable_outcome")
    op.drop_table("durable_message")
    op.drop_table("durable_history")
