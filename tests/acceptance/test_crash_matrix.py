"""A worker is killed with -9 at every boundary of a run, and nothing that was recorded happens twice.

One uninterrupted run counts the boundaries: before and after each statement, commit, message, stored
result and acknowledgement. Then one run for each is killed there, and a second worker takes it over.
Runs have a store and a queue of their own, so many of them are killed at the same time.
"""

import contextlib
import itertools
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from celery_durable.states import RunState, StepState
from celery_durable.store import queries, schema
from celery_durable.store.database import Database
from tests import servers
from tests.acceptance.harness import ROOT
from tests.acceptance.nursery import Nursery

EXPECTED = 1234
AT_ONCE = 6
SAMPLE = 6
PATIENCE = 40.0
#: What each record's step notes when it has its effect.
EFFECTS = {
    "plain": "plain",
    "retried": "retried done",
    "transactional": "transactional",
    "outer": "outer",
    "final": "final",
}
SETTINGS = {"durable_inline_delay": 0.1}

Stage = Generator[None, None, None]


@dataclass
class Stores:
    """Makes one migrated store after the other, on PostgreSQL or on SQLite."""

    kind: str
    directory: Path
    server: str
    made: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = f"cd_crash_{secrets.token_hex(4)}"
        self._file = self.directory / "template.db"
        database = Database(self._create() if self.kind == "postgresql" else f"sqlite:///{self._file}")
        schema.migrate(database)
        database.close()

    def make(self, directory: Path) -> str:
        if self.kind == "postgresql":
            return self._create(template=self._template)
        copy = directory / "store.db"
        with (
            contextlib.closing(sqlite3.connect(self._file)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        return f"sqlite:///{copy}"

    def drop(self, url: str) -> None:
        if self.kind == "postgresql":
            self._execute(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')

    def close(self) -> None:
        if self.kind == "postgresql":
            self._execute(f'DROP DATABASE IF EXISTS "{self._template}" WITH (FORCE)')

    def _create(self, template: str | None = None) -> str:
        name = f"cd_crash_{secrets.token_hex(6)}" if template else self._template
        self._execute(f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
        url = make_url(self.server).set(database=name, drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(servers.plain(self.server), autocommit=True) as conn:
            conn.execute(statement)


@dataclass
class Life:
    """One run, from its start over the death of its worker to its end."""

    nursery: Nursery
    directory: Path
    url: str
    broker: str
    whom: str
    pool: str
    crash_at: int

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.run_id = f"run-{secrets.token_hex(6)}"
        self.points = self.directory / "points"
        self.ledger = self.directory / "ledger"
        self.ledger.touch()
        self.database = Database(self.url)
        self.workers: list[int] = []
        self.recorded: set[str] = set()
        self.tried = False
        self.was_reached = True
        self.label = ""
        self.took = 0.0

    def live(self) -> Stage:
        """Let it all happen; yields while there is nothing to do but wait."""
        self._work(TEST_CRASH_POINTS=str(self.points), TEST_CRASH_AT=str(self.crash_at), TEST_CRASH_WHOM=self.whom)
        # The run comes to a worker that is up, so that nobody sends its message twice and shifts the points.
        yield from self._until(lambda: " ready." in (self.directory / "worker1.log").read_text(), "the worker")
        starter = self._start("tests.acceptance.crash_project", log="start.log")
        yield from self._until(lambda: not self.nursery.is_alive(starter), "the start")
        if self.nursery.status(starter):
            raise AssertionError((self.directory / "start.log").read_text())
        if self.crash_at:
            yield from self._until(lambda: self._has_crashed() or self._is_over(), f"point {self.crash_at}")
            self.was_reached = self._has_crashed()
            self._look_back()
            if self.was_reached and self.whom == "worker":
                yield from self._until(lambda: not self.nursery.is_alive(self.workers[0]), "the end of the worker")
                self._work()
        crashed_at = time.monotonic()
        yield from self._until(self._is_over, "the end")
        self.took = time.monotonic() - crashed_at

    def check(self) -> list[str]:
        """Return what is not as it must be."""
        lines = self.ledger.read_text().splitlines()
        with contextlib.closing(sqlite3.connect(self.directory / "side.db")) as side:
            (rows,) = side.execute("SELECT count(*) FROM side").fetchone()
        wrong = [
            f"{key} ran {lines.count(EFFECTS[key])} times" for key in self.recorded if lines.count(EFFECTS[key]) != 1
        ]
        wrong += [f"{key} never ran" for key, effect in EFFECTS.items() if effect not in lines]
        if self.tried and lines.count("retried failed") != 1:
            wrong.append("the failed attempt was repeated")
        if rows != 1:
            wrong.append(f"the side table has {rows} rows")
        run = self._run()
        if (run.state, run.result) != (RunState.SUCCEEDED, EXPECTED):
            wrong.append(f"it is {run.state} with {run.result}")
        for who in ("linked", "successor"):
            if f"{who} {EXPECTED}" not in lines:
                wrong.append(f"the {who} task was not called")
        return [f"{sentence}; ledger: {lines}" for sentence in wrong]

    def end(self) -> None:
        for pid in self.workers:
            self.nursery.kill(pid)
        self.database.close()

    def tell(self) -> str:
        history = self.database.once(lambda conn: queries.history_of(conn, self.run_id))
        moves = [f"{entry.what}({entry.epoch})" for entry in history]
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.directory.glob("worker*.log"))]
        return "\n".join([f"moves: {' '.join(moves)}", *logs])

    def _run(self) -> queries.Run:
        run = self.database.once(lambda conn: queries.get(conn, self.run_id))
        assert run is not None
        return run

    def _has_crashed(self) -> bool:
        # The counter's line is written before the kill, so wait for what follows from it as well.
        if not self.points.exists() or len(labels := self.points.read_text().splitlines()) < self.crash_at:
            if self.workers and not self.nursery.is_alive(self.workers[0]):
                raise AssertionError("the worker ended before the point was reached")
            return False
        self.label = labels[self.crash_at - 1].strip()
        return True

    def _look_back(self) -> None:
        # A run that was taken up again already may have recorded more; what counts is what the killed one had.
        of_run = f"WHERE run_id = '{self.run_id}'"
        records, recovered = self.database.once(
            lambda conn: (
                conn.exec_driver_sql(f"SELECT key, kind, state, epoch FROM durable_step {of_run}").all(),
                conn.exec_driver_sql(f"SELECT min(epoch) FROM durable_history {of_run} AND what = 'recover'").scalar(),
            )
        )
        for record in records:
            if recovered is not None and record.epoch > recovered:
                continue
            if record.kind == "step" and record.state == StepState.SUCCEEDED:
                self.recorded.add(record.key)
            self.tried = self.tried or record.key == "retried"

    def _is_over(self) -> bool:
        row = self.database.once(
            lambda conn: conn.exec_driver_sql(f"SELECT state, due_at FROM durable_run WHERE id = '{self.run_id}'").one()
        )
        if row.state in (RunState.FAILED, RunState.CANCELLED):
            raise AssertionError(f"the run is {row.state}")
        return row.state == RunState.SUCCEEDED and row.due_at is None and self._followers_ran()

    def _followers_ran(self) -> bool:
        lines = self.ledger.read_text()
        return "linked" in lines and "successor" in lines

    def _until(self, condition: Callable[[], bool], what: str) -> Stage:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not come within {PATIENCE:g} s")
            yield

    def _work(self, **environment: str) -> None:
        number = len(self.workers) + 1
        arguments = [
            "-A",
            "tests.acceptance.crash_project",
            "worker",
            "-l",
            "INFO",
            "-n",
            f"w{number}@{self.directory.name}",
        ]
        arguments += ["-P", self.pool, "-c", "1", "--without-mingle", "--without-gossip", "--without-heartbeat"]
        self.workers.append(self._start("celery", *arguments, log=f"worker{number}.log", **environment))

    def _start(self, module: str, *arguments: str, log: str, **environment: str) -> int:
        given = {
            "TEST_STORE": self.url,
            "TEST_BROKER": self.broker,
            "TEST_BACKEND": self.broker,
            "TEST_LEDGER": str(self.ledger),
            "TEST_QUEUE": self.run_id,
            "TEST_RUN_ID": self.run_id,
            "TEST_LEASE": "1.5",
            "TEST_SWEEP": "0.5",
            "TEST_PREFETCH": "1",
            "TEST_SETTINGS": json.dumps(SETTINGS),
            "PYTHONPATH": str(ROOT),
        }
        (self.directory / log).touch()
        return self.nursery.start(
            module, *arguments, log=self.directory / log, directory=self.directory, **given, **environment
        )


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery") / "log")
    yield made
    made.close()


@pytest.fixture(params=["postgresql", "sqlite"])
def stores(request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str) -> Iterator[Stores]:
    made = Stores(request.param, tmp_path, os.environ["DATABASE_URL"])
    yield made
    made.close()


@dataclass
class Matrix:
    """All lives of one test."""

    nursery: Nursery
    stores: Stores
    broker: str
    whom: str
    pool: str

    def points(self) -> list[int]:
        """Return the numbers of the boundaries of a run that nobody kills."""
        (life,) = self._played([0])
        assert not self.failures, self.failures[0]
        return list(range(1, 1 + len(life.points.read_text().splitlines())))

    def play(self, points: list[int]) -> str:
        """Kill one run at each of these points and return what went wrong."""
        lives = self._played(points)
        # One pass of the sweeper more or less, and a run has one point more or less.
        missed = [life.crash_at for life in lives if not life.was_reached]
        if len(missed) > len(lives) // 20 + 1:
            self.failures.append(f"the points {missed} were not reached")
        slowest = max(lives, key=lambda life: life.took)
        print(f"{len(lives)} runs killed; the slowest took {slowest.took:.1f} s after {slowest.label!r}")
        return "\n\n".join(self.failures)

    def _played(self, points: list[int]) -> list[Life]:
        self.failures: list[str] = []
        waiting, playing, over = iter(points), dict[int, tuple[Life, Stage]](), list[Life]()
        while True:
            for k in itertools.islice(waiting, AT_ONCE - len(playing)):
                directory = self.stores.directory / f"{self.whom}-{self.pool}-{k}"
                directory.mkdir()
                life = Life(self.nursery, directory, self.stores.make(directory), self.broker, self.whom, self.pool, k)
                playing[k] = life, life.live()
            if not playing:
                return over
            for k, (life, stage) in list(playing.items()):
                wrong: list[str] = []
                try:
                    next(stage)
                    continue
                except StopIteration:
                    wrong = life.check()
                except AssertionError as error:
                    wrong = [str(error) or repr(error)]
                if wrong:
                    self.failures.append(f"point {k}, {life.label!r}: " + "\n".join([*wrong, life.tell()]))
                life.end()
                self.stores.drop(life.url)
                over.append(life)
                del playing[k]
            time.sleep(0.02)


#: Who is killed, and in which pool: the whole worker, or only the process that executes the run.
WAYS = pytest.mark.parametrize(("whom", "pool"), [("worker", "prefork"), ("child", "prefork"), ("worker", "solo")])


@WAYS
def test_a_run_survives_a_kill_at_a_sample_of_its_boundaries(
    nursery: Nursery, stores: Stores, redis_url: str, whom: str, pool: str
) -> None:
    matrix = Matrix(nursery, stores, redis_url, whom, pool)
    points = matrix.points()
    # Where the sample begins differs, so that all six together see more of the boundaries.
    first = sum(map(ord, whom + pool + stores.kind)) % SAMPLE

    wrong = matrix.play(points[first::SAMPLE])

    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
@WAYS
def test_a_run_survives_a_kill_at_each_of_its_boundaries(
    nursery: Nursery, stores: Stores, redis_url: str, whom: str, pool: str
) -> None:
    matrix = Matrix(nursery, stores, redis_url, whom, pool)
    points = matrix.points()
    if os.environ.get("DURABLE_SLOW") == "short":
        points = points[::2]

    wrong = matrix.play(points)

    assert not wrong, wrong
