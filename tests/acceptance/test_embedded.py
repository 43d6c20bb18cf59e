"""The broker in files, with real processes at both ends."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue

from celery_durable.contrib import embedded

ROOT = Path(__file__).parents[2]
COUNT = 2_000
READER = """
import socket, sys
from kombu import Connection, Consumer, Queue
from celery_durable.contrib import embedded

given = embedded.settings(sys.argv[1])
seen = open(sys.argv[2], "a", buffering=1)

def note(body, message):
    seen.write(f"{body}\\n")
    message.ack()

options = given["broker_transport_options"] | {"polling_interval": 0.0001}
with Connection(transport=given["broker_transport"], transport_options=options) as connection:
    with Consumer(connection, [Queue("numbers", routing_key="numbers")], callbacks=[note], accept=["json"]):
        seen.write("ready\\n")
        while True:
            try:
                connection.drain_events(timeout=0.5)
            except socket.timeout:
                pass
"""


def connect(directory: Path) -> Connection:
    given = embedded.settings(directory)
    return Connection(transport=given["broker_transport"], transport_options=given["broker_transport_options"])


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start Python processes in the checkout that are killed after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(*arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHOP_HOME": str(tmp_path)}
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait(10)


def test_of_many_messages_two_hasty_readers_lose_none_and_double_none(tmp_path: Path, start: Any) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    readers = [start("-c", READER, str(tmp_path), str(file)) for file in files]
    wait_until(lambda: all(file.exists() and "ready" in file.read_text() for file in files))

    def seen() -> list[str]:
        return [line for file in files for line in file.read_text().splitlines() if line != "ready"]

    with connect(tmp_path) as connection:
        queue = Queue("numbers", routing_key="numbers")
        producer = connection.Producer()
        for number in range(COUNT):
            producer.publish(number, routing_key="numbers", declare=[queue] if number == 0 else [])
    wait_until(lambda: len(seen()) >= COUNT or any(reader.poll() is not None for reader in readers))

    assert [reader.poll() for reader in readers] == [None, None]
    assert Counter(seen()) == Counter(str(number) for number in range(COUNT))


def test_queues_that_are_bound_at_once_all_get_what_is_sent_to_everybody(tmp_path: Path) -> None:
    everybody = Exchange("everybody", type="fanout")
    queues = [Queue(f"listener-{number}", everybody) for number in range(20)]

    def bind(queue: Queue) -> None:
        with connect(tmp_path) as connection:
            queue(connection.default_channel).declare()

    threads = [threading.Thread(target=bind, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with connect(tmp_path) as connection:
        connection.Producer().publish("hello", exchange=everybody, declare=[everybody])
        heard = [queue(connection.default_channel).get(no_ack=True) for queue in queues]

    assert [message.payload if message else None for message in heard] == ["hello"] * len(queues)


def test_two_directories_in_one_process_do_not_share_what_is_declared(tmp_path: Path) -> None:
    queue = Queue("orders", Exchange("orders", type="topic"), routing_key="orders.#")
    for name in ("first", "second"):
        with connect(tmp_path / name) as connection:
            connection.Producer().publish(name, exchange=queue.exchange, routing_key="orders.new", declare=[queue])

    for name in ("first", "second"):
        with connect(tmp_path / name) as connection:
            message = queue(connection.default_channel).get(no_ack=True)
            assert message is not None and message.payload == name


def test_a_worker_on_files_answers_inspect(tmp_path: Path, start: Any) -> None:
    celery = ("-m", "celery", "-A", "example_project.shop")

    assert start("-c", "from example_project import shop; shop.durable.migrate()").wait(30) == 0
    start(*celery, "worker", "-P", "solo", "--without-mingle", "--without-gossip")
    wait_until(lambda: start(*celery, "inspect", "ping", "--timeout", "1").wait(30) == 0)

    assert start(*celery, "inspect", "registered", "--timeout", "1").wait(30) == 0
