"""Creates and upgrades the tables, and says whether they fit this release.

Any number of processes may migrate at once: the first does the work while the others wait.
"""

import io
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from celery_durable.errors import SchemaError
from celery_durable.store.database import Database

VERSION_TABLE = "durable_schema_version"
_LOCK = 0x64757261626C65  # "durable"


def migrate(database: Database) -> str:
    """Bring the tables to this release; return their version.

    Raises:
        SchemaError: when they are newer than this release.
        StoreUnavailable: when the store does not answer.
    """

    def upgrade(conn: Connection) -> str:
        _wait_for_others(conn)
        if database.schema is not None:
            conn.execute(sa.schema.CreateSchema(database.schema, if_not_exists=True))
        if _version(conn) not in (None, *_known()):
            raise SchemaError(_too_new(_version(conn)))
        configuration = _configuration()
        configuration.attributes.update(connection=conn, schema=database.schema)
        command.upgrade(configuration, "head")
        return head()

    return database.atomically(upgrade)


def sql(database: Database) -> str:
    """Return the statements that create the tables from nothing."""
    output = io.StringIO()
    configuration = _configuration()
    configuration.output_buffer = output
    configuration.attributes.update(dialect=database.engine.dialect.name, schema=database.schema)
    command.upgrade(configuration, "head", sql=True)
    if database.schema is None:
        return output.getvalue()
    name = database.engine.dialect.identifier_preparer.quote(database.schema)
    return f"CREATE SCHEMA IF NOT EXISTS {name};\n\nSET search_path TO {name};\n\n{output.getvalue()}"


def check(conn: Connection) -> None:
    """Refuse tables that do not fit.

    Raises:
        SchemaError: when they are missing, older or newer.
    """
    version = _version(conn)
    if version is None:
        raise SchemaError("the store has no tables yet; run: celery -A <app> durable migrate")
    if version not in _known():
        raise SchemaError(_too_new(version))
    if version != head():
        raise SchemaError(
            f"the tables are of version {version}, this release needs {head()}; run: celery -A <app> durable migrate"
        )


def head() -> str:
    """Return the version of the tables that this release needs."""
    return _known()[0]


def _known() -> list[str]:
    scripts = ScriptDirectory.from_config(_configuration())
    return [script.revision for script in scripts.walk_revisions()]


def _configuration() -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return configuration


def _version(conn: Connection) -> str | None:
    table = sa.Table(VERSION_TABLE, sa.MetaData(), sa.Column("version_num", sa.Text))
    if not sa.inspect(conn).has_table(VERSION_TABLE, schema=_schema_of(conn)):
        return None
    version: str | None = conn.execute(sa.select(table.c.version_num)).scalar()
    return version


def _schema_of(conn: Connection) -> str | None:
    translated = conn.get_execution_options().get("schema_translate_map") or {}
    schema: str | None = translated.get(None)
    return schema


def _wait_for_others(conn: Connection) -> None:
    """Keep other migrations out until the transaction ends; on SQLite the transaction itself does."""
    if conn.dialect.name == "postgresql":
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


def _too_new(version: str | None) -> str:
    return f"the tables are of version {version}, which this release does not know; upgrade celery-durable"
