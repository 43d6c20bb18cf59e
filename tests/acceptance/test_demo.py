"""The demo, as a new user runs it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0


class Demo:
    """A demo of its own, whose processes are known by the home of their shop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        environment = {**os.environ, "TMPDIR": str(directory), "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "example_project.demo"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """Return the processes that the demo has started."""
        mark = f"SHOP_HOME={self.directory}/".encode()
        return [pid for pid in running_processes() if pid != self.process.pid and mark in environment_of(pid)]

    def read_until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return
        raise AssertionError(f"the demo ended without a line that has {words!r}")

    def is_tidied_up(self) -> bool:
        end = time.monotonic() + 10
        while self.workers() or list(self.directory.iterdir()):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def running_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it is gone, or somebody else's
        return b""


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("the processes of a demo are recognised by /proc")
    started = Demo(tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


def test_the_demo_proves_that_nobody_paid_twice(demo: Any) -> None:
    began = time.monotonic()

    output, _ = demo.process.communicate(timeout=TIMEOUT)

    assert demo.process.returncode == 0, output
    assert time.monotonic() - began < TIMEOUT
    assert "\x1b" not in output
    for words in ("kill -9 of the worker", "charge cut off", "charge kept", "charge ran again", "sleep kept"):
        assert words in output
    assert "each of the 6 orders was charged exactly once" in " ".join(output.split())
    assert demo.is_tidied_up()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str
)
def test_a_demo_that_is_stopped_leaves_no_worker_and_no_file(demo: Any, number: int, code: int) -> None:
    demo.read_until("charge runs")
    assert len(demo.workers()) >= 2

    demo.process.send_signal(number)
    output, _ = demo.process.communicate(timeout=20)

    assert demo.process.returncode == code
    assert "Traceback" not in output
    assert demo.is_tidied_up()
