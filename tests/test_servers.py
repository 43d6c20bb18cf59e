"""The servers the tests rely on start, answer, come back, and never outlive the process that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from kombu import Connection

from tests import servers
from tests.servers import Server, StatementLog, plain

LAUNCHERS = {"postgres": servers.postgres, "redis": servers.redis, "rabbitmq": servers.rabbitmq}
PARENT = """
import sys, time
from pathlib import Path
from tests import servers
server = getattr(servers, sys.argv[1])(Path(sys.argv[2])).wait()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""

each_server = pytest.mark.parametrize(
    "kind", ["postgres", "redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]
)


@pytest.fixture
def launch(tmp_path: Path, kind: str) -> Iterator[Server]:
    server = LAUNCHERS[kind](need(kind, tmp_path))
    assert server is not None
    yield server.wait()
    server.stop()


def need(kind: str, directory: Path) -> Path:
    if kind == "rabbitmq" and servers.rabbitmq_binary() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("RabbitMQ is not installed")
    return directory


def ask(url: str) -> object:
    if url.startswith("postgresql"):
        with psycopg.connect(plain(url), connect_timeout=5) as conn:
            return conn.execute("SELECT 1").fetchone()
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            return client.ping()
    with Connection(url) as connection:
        return connection.connect()


def is_open(url: str) -> bool:
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.05)


@each_server
def test_a_server_answers_crashes_comes_back_and_stops(launch: Server) -> None:
    assert ask(launch.url)

    launch.kill()
    assert not is_open(launch.url)

    assert ask(launch.start().url)

    launch.stop()
    assert not is_open(launch.url)


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_restart_keeps_the_address(launch: Server) -> None:
    pid = launch.pid

    launch.restart(downtime=0.1)

    assert ask(launch.url)
    assert launch.pid != pid


@each_server
def test_a_server_dies_with_a_parent_killed_with_9(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, kind, str(need(kind, tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        assert is_open(url)

        parent.send_signal(signal.SIGKILL)

    wait_until(lambda: not is_open(url))
    wait_until(lambda: not is_running(int(pid)))
    wait_until(lambda: not processes_naming(tmp_path))


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def processes_naming(directory: Path) -> list[str]:
    listing = subprocess.run(["ps", "-Ao", "stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if str(directory) in line and not line.startswith("Z")]


def test_fixtures_hand_out_servers_that_answer(postgres_url: str, fresh_postgres_url: str, redis_url: str) -> None:
    assert ask(postgres_url)
    assert ask(fresh_postgres_url)
    assert ask(redis_url)
    assert postgres_url != fresh_postgres_url


@pytest.mark.rabbitmq
def test_every_test_has_a_virtual_host_of_its_own(amqp_url: str) -> None:
    with Connection(amqp_url) as connection:
        queue = connection.SimpleQueue("greetings")
        queue.put("hello")
        assert queue.get(timeout=5).payload == "hello"
        queue.close()


def test_the_statement_log_counts_what_one_application_sent(
    fresh_postgres_url: str, postgres_log: StatementLog
) -> None:
    url = plain(fresh_postgres_url)
    with psycopg.connect(url, application_name="counted", autocommit=True) as conn:
        conn.execute("SELECT 'before the mark'")
        mark = postgres_log.mark()
        with psycopg.connect(url, application_name="other", autocommit=True) as other:
            other.execute("SELECT 'not mine'")
        conn.execute("SELECT 1,\n  2")
        conn.execute("SELECT %s::int", (3,))

    assert postgres_log.statements("counted", since=mark) == ["SELECT 1,\n  2", "SELECT $1::int"]
