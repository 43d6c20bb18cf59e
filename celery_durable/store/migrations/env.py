"""Runs the migrations on the connection that `store.schema` hands over."""

from typing import Any

from alembic import context

from celery_durable.store.tables import metadata

attributes = context.config.attributes
options: dict[str, Any] = {
    "target_metadata": metadata,
    "version_table": "durable_schema_version",
    "version_table_schema": attributes.get("schema"),
}

if context.is_offline_mode():
    context.configure(dialect_name=attributes["dialect"], literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    context.configure(connection=attributes["connection"], **options)
    context.run_migrations()
