"""Servers and fresh databases for every test that asks for one.

Servers start once a session, in the process that was started: at once when it hands the tests to xdist
workers, which find the URLs in the environment, else when first needed. URLs already in the environment
(DATABASE_URL, REDIS_URL, AMQP_URL) win. No test sees what another left behind: each gets its own database,
Redis index or virtual host.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from tests import servers

STARTERS = {"DATABASE_URL": servers.postgres, "REDIS_URL": servers.redis, "AMQP_URL": servers.rabbitmq}
REDIS_DATABASES = 256
_running: dict[str, servers.Server] = {}
_home: Path | None = None


def start(variable: str) -> None:
    """Put a server's URL into the environment, unless one is there or the server is not installed."""
    global _home
    if variable in os.environ:
        return
    if _home is None:
        _home = Path(tempfile.mkdtemp(prefix="durable-tests-"))
        _home.chmod(0o755)  # PostgreSQL is nobody when we are root
    server = STARTERS[variable](_home / variable.removesuffix("_URL").lower())
    if server is not None:
        _running[variable] = server
        os.environ[variable] = server.url
        os.environ[f"{variable}_LOG"] = str(server.log)
        os.environ[f"{variable}_ADMIN"] = server.admin_url or ""


def pytest_configure(config: pytest.Config) -> None:
    spreads = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if spreads and not config.option.collectonly:
        for variable in STARTERS:
            start(variable)


def pytest_unconfigure(config: pytest.Config) -> None:
    for variable, server in _running.items():
        server.stop()
        for suffix in ("", "_LOG", "_ADMIN"):
            os.environ.pop(variable + suffix, None)
    _running.clear()
    if _home is not None:
        shutil.rmtree(_home, ignore_errors=True)


def pytest_report_header() -> list[str]:
    def said(variable: str) -> str:
        if variable in _running:
            return _running[variable].name
        if variable in os.environ:
            return make_url(os.environ[variable]).render_as_string(hide_password=True)
        missing = variable == "AMQP_URL" and servers.rabbitmq_binary() is None
        return "not installed" if missing else "started when first used"

    return [f"{variable}: {said(variable)}" for variable in STARTERS]


def _create_database(name: str) -> str:
    start("DATABASE_URL")
    base = os.environ["DATABASE_URL"]
    with psycopg.connect(servers.plain(base), autocommit=True) as conn:
        conn.execute(f'CREATE DATABASE "{name}"')
    url = make_url(base).set(database=name, drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


def _drop_database(name: str) -> None:
    with psycopg.connect(servers.plain(os.environ["DATABASE_URL"]), autocommit=True) as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A SQLAlchemy URL of a PostgreSQL database that only this process uses, for the whole session."""
    name = f"cd_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}_{secrets.token_hex(4)}"
    yield _create_database(name)
    _drop_database(name)


@pytest.fixture
def fresh_postgres_url() -> Iterator[str]:
    """A SQLAlchemy URL of an empty PostgreSQL database that is dropped after the test."""
    name = f"cd_test_{secrets.token_hex(6)}"
    yield _create_database(name)
    _drop_database(name)


@pytest.fixture
def postgres_log(fresh_postgres_url: str) -> servers.StatementLog:
    """What the server of `fresh_postgres_url` was sent, for sessions that begin in the test."""
    if "DATABASE_URL_LOG" not in os.environ:
        pytest.skip("cannot read the log of a PostgreSQL that the tests did not start")
    log = servers.StatementLog(Path(os.environ["DATABASE_URL_LOG"]), fresh_postgres_url)
    log.enable()
    return log


@pytest.fixture(scope="session")
def _redis_indexes() -> Iterator[int]:
    # Each xdist worker takes turns through its own share of the indexes, so that a process which outlives
    # its test by a moment writes into one that nobody uses soon.
    share = REDIS_DATABASES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first = share * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return itertools.cycle(range(first, first + share))


@pytest.fixture
def redis_url(_redis_indexes: Iterator[int]) -> str:
    """The URL of an empty Redis database."""
    start("REDIS_URL")
    url = os.environ["REDIS_URL"].rsplit("/", 1)[0] + f"/{next(_redis_indexes)}"
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
    return url


@pytest.fixture
def amqp_url() -> Iterator[str]:
    """The URL of an empty RabbitMQ virtual host; of the whole server if it is not ours."""
    start("AMQP_URL")
    if "AMQP_URL" not in os.environ:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("RabbitMQ is not installed")
    admin = os.environ.get("AMQP_URL_ADMIN")
    if not admin:
        yield os.environ["AMQP_URL"]
        return
    vhost = f"test-{secrets.token_hex(6)}"
    servers.wait_for_rabbitmq(admin)  # it may still be starting
    servers.create_vhost(admin, vhost)
    yield os.environ["AMQP_URL"].rstrip("/") + f"/{vhost}"
    servers.delete_vhost(admin, vhost)
