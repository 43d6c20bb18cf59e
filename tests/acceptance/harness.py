"""Starts real worker processes of `project` and looks at what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 40.0


@dataclass
class Worker:
    """One `celery worker` with its whole process group."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill the main process with -9; its children end with it or are killed too."""
        self.process.kill()
        self.process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = TIMEOUT) -> int:
        """Ask for a warm shutdown and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout)


@dataclass
class Project:
    """The servers and the files of one test."""

    directory: Path
    store: str
    broker: str
    backend: str
    settings: dict[str, str] = field(default_factory=dict)
    count: int = 0

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger"

    def lines(self, *words: str) -> list[str]:
        """Return the ledger's lines that begin with these words."""
        if not self.ledger.exists():
            return []
        return [line for line in self.ledger.read_text().splitlines() if line.split()[: len(words)] == list(words)]

    def environment(self) -> dict[str, str]:
        given = {
            "TEST_STORE": self.store,
            "TEST_BROKER": self.broker,
            "TEST_BACKEND": self.backend,
            "TEST_LEDGER": str(self.ledger),
            **self.settings,
        }
        return {**os.environ, **given, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    @contextmanager
    def worker(
        self, *arguments: str, pool: str = "prefork", concurrency: int = 2, ready: bool = True, **environment: str
    ) -> Iterator[Worker]:
        """Run a worker until the block ends; it is killed when it does not stop by itself."""
        worker = self.start_worker(*arguments, pool=pool, concurrency=concurrency, ready=ready, **environment)
        try:
            yield worker
        finally:
            if worker.process.poll() is None:
                worker.kill()

    def start_worker(
        self, *arguments: str, pool: str = "prefork", concurrency: int = 2, ready: bool = True, **environment: str
    ) -> Worker:
        self.count += 1
        log = self.directory / f"worker{self.count}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.acceptance.project", "worker", "-l", "INFO"]
        command += ["-n", f"w{self.count}@{self.directory.name}", "-P", pool, "-c", str(concurrency), *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self.environment() | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        worker = Worker(process, log)
        if ready:
            wait_until(lambda: " ready." in worker.text() or process.poll() is not None, what="the worker", log=log)
            assert process.poll() is None, worker.text()
        return worker

    def load(self) -> "object":
        """Import `project` in this process with the servers of this test and return the module."""
        for name in [name for name in sys.modules if name == "tests.acceptance.project"]:
            del sys.modules[name]
        before = dict(os.environ)
        os.environ.update(self.environment())
        try:
            import importlib

            return importlib.import_module("tests.acceptance.project")
        finally:
            os.environ.clear()
            os.environ.update(before)


def wait_until(
    condition: Callable[[], object], timeout: float = TIMEOUT, what: str = "it", log: Path | None = None
) -> None:
    """Wait until a condition holds, looking every 50 ms."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            tail = log.read_text(errors="replace")[-3000:] if log is not None else ""
            raise AssertionError(f"{what} did not come within {timeout:g} s\n{tail}")
        time.sleep(0.05)
