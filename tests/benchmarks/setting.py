"""What the benchmarks run on: PostgreSQL that syncs to disk, Redis, databases and worker processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from celery_durable.store import schema
from celery_durable.store.database import Database
from tests import servers

ROOT = Path(__file__).parents[2]
SAFE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


class Setting:
    """The servers of one run of the benchmarks, and how thoroughly it measures."""

    def __init__(self, directory: Path, *, is_quick: bool) -> None:
        self.directory = directory
        self.is_quick = is_quick
        self.postgres = servers.postgres(directory / "postgres", settings=SAFE)
        self.redis = servers.redis(directory / "redis")
        self.store = self.database("bench")
        self._workers = 0

    def database(self, name: str) -> str:
        """Create a database with the tables and return its URL."""
        with psycopg.connect(servers.plain(self.postgres.url), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")
        url = self.postgres.url.rsplit("/", 1)[0] + f"/{name}"
        database = Database(url)
        schema.migrate(database)
        database.close()
        return url

    def environment(self, store: str = "") -> dict[str, str]:
        """Return what `project` reads."""
        redis = self.redis.url.rsplit("/", 1)[0]
        return {
            "BENCH_STORE": store or self.store,
            "BENCH_BROKER": f"{redis}/0",
            "BENCH_BACKEND": f"{redis}/1",
            "BENCH_NOTES": f"{redis}/2",
        }

    @contextlib.contextmanager
    def worker(self, *, store: str = "", concurrency: int = 2) -> Iterator[subprocess.Popen[bytes]]:
        """Run one worker until the block ends."""
        self._workers += 1
        name = f"w{self._workers}"
        log = self.directory / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.project", "worker", "-l", "WARNING"]
        command += ["-n", f"{name}@bench", "-P", "prefork", "-c", str(concurrency)]
        environment = {
            **os.environ,
            **self.environment(store),
            "PYTHONPATH": str(ROOT),
            "BENCH_READY": str(log) + ".ok",
        }
        with log.open("wb") as output:
            worker = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until(Path(environment["BENCH_READY"]).exists, 60, what=f"the worker, see {log},")
            yield worker
        finally:
            kill(worker)


def kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its pool with -9."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def wait_until(condition: Callable[[], object], timeout: float, *, what: str, pause: float = 0.005) -> float:
    """Wait until a condition holds; return how many seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout:
            raise TimeoutError(f"{what} did not come within {timeout:g} s")
        time.sleep(pause)
    return time.monotonic() - began
