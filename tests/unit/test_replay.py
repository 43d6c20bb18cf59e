"""Any run, cut off anywhere, goes on to the same end and repeats nothing that it has recorded.

The bodies are made up by hypothesis; the engine and the store are the real ones, without any worker.
"""

import dataclasses
import inspect
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_durable import RetryPolicy, random, sleep, step
from celery_durable.codec import Codec
from celery_durable.engine.context import Context, Rules
from celery_durable.engine.outcome import Completed, Outcome, Suspended
from celery_durable.engine.runner import execute
from celery_durable.states import RunState, StepState
from celery_durable.store import runs, schema, steps
from celery_durable.store.database import Database
from celery_durable.store.runs import NewRun
from celery_durable.store.steps import Record
from celery_durable.store.tables import run as run_table
from celery_durable.store.tables import step as step_table

HOUR = timedelta(hours=1)
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Step:
    """A step that fails so many times before it succeeds; the retries are its own."""

    name: str
    failures: int = 0


@dataclass(frozen=True)
class Hopeless:
    """A step that never succeeds and whose failure the body catches."""

    name: str
    attempts: int


@dataclass(frozen=True)
class Random:
    """A recorded random number."""


@dataclass(frozen=True)
class Sleep:
    """A sleep, either in the worker or as a suspension."""

    seconds: float


@dataclass(frozen=True)
class Branch:
    """What is taken only if the sum so far is even."""

    then: tuple[Any, ...]
    otherwise: tuple[Any, ...]


NAMES = st.sampled_from(["charge", "ship", "mail"])
SIMPLE = st.one_of(
    st.builds(Step, NAMES, st.integers(0, 3)),
    st.builds(Hopeless, NAMES, st.integers(1, 3)),
    st.just(Random()),
    st.builds(Sleep, st.sampled_from([0.0, 3600.0])),
)
OPERATIONS = st.one_of(
    SIMPLE, st.builds(Branch, st.lists(SIMPLE, max_size=3).map(tuple), st.lists(SIMPLE, max_size=3).map(tuple))
)
PROGRAMS = st.lists(OPERATIONS, min_size=1, max_size=8).map(tuple)


class Crash(BaseException):
    """The process ends here."""


@dataclass
class World:
    """What a run does outside: how often each of its calls was executed, and the numbers it drew."""

    program: tuple[Any, ...]
    executed: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    drawn: list[float] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        self.drawn.clear()
        self._sum = 0
        self._trace: list[Any] = []
        self._calls: Counter[str] = Counter()
        self._take(self.program)
        return {"sum": self._sum, "trace": self._trace}

    def _take(self, operations: tuple[Any, ...]) -> None:
        for operation in operations:
            match operation:
                case Step(name, failures):
                    value = self._call(name, failures, attempts=failures + 1)
                    self._sum += value
                    self._trace.append(value)
                case Hopeless(name, attempts):
                    try:
                        self._call(name, attempts, attempts=attempts)
                    except Exception as error:
                        self._trace.append(str(error))
                case Random():
                    self.drawn.append(random())
                case Sleep(seconds):
                    sleep(seconds)
                case Branch(then, otherwise):
                    self._take(otherwise if self._sum % 2 else then)

    def _call(self, name: str, failures: int, attempts: int) -> int:
        self._calls[name] += 1
        key = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"

        def function() -> int:
            self.executed[key] += 1
            if self.executed[key] <= failures:
                raise ValueError(f"{key} fails")
            self.succeeded[key] += 1
            return len(key)

        return step(function, name=name, retry=RetryPolicy(max_attempts=attempts, min_delay=0, max_delay=0))()


@dataclass
class Store:
    """Executes runs on a database."""

    database: Database

    def drive(self, run_id: str, world: World, crash_after: int | None = None) -> Outcome:
        """Execute a run, through its suspensions, to its end or until so many of its steps are recorded."""
        written = 0

        def on_step(record: Record) -> None:
            nonlocal written
            written += 1
            if written == crash_after:
                raise Crash

        rules = Rules(
            retry=RetryPolicy.none(),
            inline_delay=timedelta(seconds=1),
            max_payload=10**6,
            on_divergence="fail",
            version="1",
            worker="w",
            on_step=on_step,
        )
        new = NewRun(id=run_id, task="made up", envelope="{}")
        while True:
            claim = self.database.once(lambda conn: runs.claim_or_store(conn, new, worker="w", process=1, lease=HOUR))
            assert claim is not None
            context = Context(self.database, run_id, "made up", claim, rules)
            outcome = execute(context, world.body, Codec("the result", inspect.Parameter.empty))
            if not isinstance(outcome, Suspended):
                return outcome
            self._suspend_and_wake(run_id, claim.epoch, outcome)

    def records(self, run_id: str) -> list[Record]:
        return self.database.once(lambda conn: steps.load(conn, run_id))

    def free(self, run_id: str, *, keep: int | None = None) -> None:
        """Make a run pending again, as the end of its lease would; keep only its first records."""
        pending = sa.update(run_table).where(run_table.c.id == run_id).values(state=RunState.PENDING)
        self.database.once(lambda conn: conn.execute(pending))
        if keep is not None:
            later = sa.delete(step_table).where(step_table.c.run_id == run_id, step_table.c.seq > keep)
            self.database.once(lambda conn: conn.execute(later))

    def _suspend_and_wake(self, run_id: str, epoch: int, suspended: Suspended) -> None:
        # Its time has come at once.
        record = suspended.record and dataclasses.replace(suspended.record, wake_in=0.0, wake_at=None)
        moved = self.database.once(
            lambda conn: runs.suspend(
                conn,
                run_id,
                suspended.move,
                epoch=epoch,
                who="w",
                why=suspended.why,
                version="1",
                due_in=timedelta(),
                record=record,
            )
        )
        assert moved
        assert self.database.once(lambda conn: runs.wake(conn, [run_id], resend=HOUR)) == [run_id]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path: Path = tmp_path_factory.mktemp("replay") / "store.db"
    database = Database(f"sqlite:///{path}")
    schema.migrate(database)
    yield Store(database)
    database.close()


@PROPERTY
@given(program=PROGRAMS, data=st.data())
def test_a_run_replayed_from_any_prefix_of_its_records_ends_the_same_and_repeats_none_of_them(
    store: Store, program: tuple[Any, ...], data: st.DataObject
) -> None:
    run_id = secrets.token_hex(8)
    first = World(program)
    uninterrupted = store.drive(run_id, first)
    keep = data.draw(st.integers(0, len(store.records(run_id))), label="records kept")
    store.free(run_id, keep=keep)
    kept = store.records(run_id)

    again = World(program)
    replayed = store.drive(run_id, again)

    assert isinstance(uninterrupted, Completed)
    assert replayed == uninterrupted
    assert not again.executed.keys() & {record.key for record in kept if record.kind == "step"}
    numbers = sum(record.kind == "value" for record in kept)
    assert again.drawn[:numbers] == first.drawn[:numbers]


@PROPERTY
@given(program=PROGRAMS, data=st.data())
def test_a_run_whose_process_dies_after_any_record_takes_no_attempt_twice(
    store: Store, program: tuple[Any, ...], data: st.DataObject
) -> None:
    calm = World(program)
    uninterrupted = store.drive(secrets.token_hex(8), calm)
    run_id, world = secrets.token_hex(8), World(program)

    outcome = None
    while outcome is None:
        crash_after = data.draw(st.none() | st.integers(1, 3), label="records until the crash")
        try:
            outcome = store.drive(run_id, world, crash_after)
        except Crash:
            store.free(run_id)

    assert outcome == uninterrupted
    assert world.executed == calm.executed


@PROPERTY
@given(program=PROGRAMS, data=st.data())
def test_a_run_whose_process_dies_inside_a_step_repeats_at_most_that_step(
    store: Store, program: tuple[Any, ...], data: st.DataObject
) -> None:
    calm = World(program)
    uninterrupted = store.drive(secrets.token_hex(8), calm)
    run_id, world = secrets.token_hex(8), World(program)
    dying = data.draw(st.sampled_from(sorted(calm.succeeded) or ["none"]), label="dies in")

    class Dying(Counter[str]):
        def __setitem__(self, key: str, value: int) -> None:
            super().__setitem__(key, value)
            if key == dying and value == 1:
                raise Crash

    world.succeeded = Dying()
    outcome = None
    while outcome is None:
        try:
            outcome = store.drive(run_id, world)
        except Crash:
            store.free(run_id)

    assert outcome == uninterrupted
    assert world.executed - calm.executed == Counter({dying: 1} if dying in calm.succeeded else {})


@PROPERTY
@given(program=PROGRAMS)
def test_a_replayed_body_finds_every_record_and_writes_none(store: Store, program: tuple[Any, ...]) -> None:
    run_id, world = secrets.token_hex(8), World(program)
    store.drive(run_id, world)
    before = store.records(run_id)
    store.free(run_id)

    replayed = World(program)
    store.drive(run_id, replayed)

    def what(record: Record) -> tuple[Any, ...]:
        return record.key, record.seq, record.kind, record.state, record.attempts, record.output, record.error

    assert [what(record) for record in store.records(run_id)] == [what(record) for record in before]
    assert not replayed.executed
    assert all(record.state is not StepState.RETRYING for record in before)
