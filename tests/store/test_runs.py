"""Every move of a run is allowed exactly from its sources, for its owner, and leaves a note."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_durable import Durable
from celery_durable.messages.envelope import Envelope
from celery_durable.states import LIVE, MOVES, SUSPENDED, TERMINAL, RunState
from celery_durable.store import queries, runs, steps
from celery_durable.store.database import Connection, Database
from celery_durable.store.expressions import now
from celery_durable.store.runs import Claim, Due
from celery_durable.store.tables import message, outcome, run, step
from celery_durable.worker.sweeper import sweep
from tests.factory import (
    ERROR,
    LEASE,
    PROCESS,
    RESEND,
    WORKER,
    Made,
    advance,
    append,
    finish,
    make_record,
    make_run,
    new_run,
    notes_of,
    row_of,
    state_of,
    suspend,
    take,
)

HOUR = timedelta(hours=1)


def seen(made: Made, **values: Any) -> Due:
    """Return what a sweeper that looked at a run has seen of it."""
    given = {"state": RunState.RUNNING, "crashes": 0, "crash_mark": 0, "records": 0, "queue": None}
    return Due(id=made.id, epoch=made.epoch, **(given | values))


def recover(database: Database, made: Made, *, crashes: int = 1, **values: Any) -> bool:
    return database.once(lambda conn: runs.recover(conn, seen(made, **values), crashes=crashes, resend=RESEND))


def fail_lost(database: Database, made: Made) -> bool:
    lost = {"error": ERROR, "error_code": "crash_loop", "why": "it died again", "resend": RESEND}
    return database.once(lambda conn: runs.fail_lost(conn, seen(made), **lost))


def cancel(database: Database, made: Made) -> RunState | None:
    return database.once(lambda conn: runs.cancel(conn, made.id, who="ann", why="no longer wanted", resend=RESEND))


def discard(database: Database, made: Made, *, expired: bool) -> None:
    database.once(lambda conn: runs.discard(conn, made.id, who=WORKER, expired=expired))


def retry(database: Database, made: Made) -> bool:
    return database.once(lambda conn: runs.retry(conn, made.id, who="ann", why="the bug is fixed", resend=RESEND))


def wake(database: Database, *made: Made) -> list[str]:
    return database.once(lambda conn: runs.wake(conn, [one.id for one in made], resend=RESEND))


def send_again(database: Database, *made: Made) -> list[str]:
    return database.once(lambda conn: runs.send_again(conn, [one.id for one in made], resend=RESEND))


def time_out(database: Database, made: Made, worker: str = WORKER) -> bool:
    return database.once(lambda conn: runs.time_out(conn, made.id, worker=worker, error=ERROR, why="took too long"))


def give_up(database: Database, made: Made) -> bool:
    return database.once(lambda conn: runs.fail_unsendable(conn, made.id, error=ERROR, why="it cannot be read"))


def due(database: Database, limit: int = 100) -> list[Due]:
    return database.once(lambda conn: runs.due(conn, limit))


#: Every way in which the store makes a move.
WAYS: dict[str, list[Callable[[Database, Made], object]]] = {
    "claim": [take],
    "suspend": [lambda database, made: suspend(database, made, "suspend", due_in=HOUR)],
    "back_off": [lambda database, made: suspend(database, made, "back_off", due_in=HOUR, next_attempt=True)],
    "release": [lambda database, made: suspend(database, made, "release", due_in=RESEND)],
    "recover": [recover],
    "wake": [wake],
    "succeed": [finish],
    "fail": [lambda database, made: finish(database, made, "fail"), fail_lost, time_out],
    "give_up": [give_up],
    "expire": [lambda database, made: discard(database, made, expired=True)],
    "cancel": [
        lambda database, made: discard(database, made, expired=False),
        lambda database, made: (
            finish(database, made, "cancel") if state_of(database, made) is RunState.RUNNING else cancel(database, made)
        ),
    ],
    "retry": [retry],
}
EACH_WAY = [pytest.param(move, way, id=f"{move}-{n}") for move, ways in WAYS.items() for n, way in enumerate(ways, 1)]
#: The moves that only the owner of an epoch makes.
BY_OWNER = [parameter for parameter in EACH_WAY if MOVES[parameter.values[0]].sources == {RunState.RUNNING}]
each_state = pytest.mark.parametrize("state", RunState)


def test_every_move_is_tried() -> None:
    assert WAYS.keys() == MOVES.keys()


@each_state
@pytest.mark.parametrize(("move", "make"), EACH_WAY)
def test_a_move_is_made_from_its_sources_and_from_no_other_state(
    database: Database, move: str, make: Callable[[Database, Made], object], state: RunState
) -> None:
    made = make_run(database, state=state)
    advance(database, timedelta(days=1))
    before, noted = row_of(database, made), len(notes_of(database, made))

    make(database, made)

    if state in MOVES[move].sources:
        assert state_of(database, made) is MOVES[move].target
        assert [note[0] for note in notes_of(database, made)[noted:]] == [move]
    else:
        assert row_of(database, made) == before
        assert len(notes_of(database, made)) == noted


@pytest.mark.parametrize(
    ("move", "make"), [each for each in BY_OWNER if each.id not in ("fail-3", "cancel-1", "cancel-2")]
)
def test_a_worker_that_lost_its_lease_cannot_move_the_run(
    database: Database, move: str, make: Callable[[Database, Made], object]
) -> None:
    made = make_run(database, state=RunState.RUNNING)
    advance(database, HOUR)
    recover(database, made)
    assert take(database, made, worker="w2") is not None
    advance(database, HOUR)
    before, noted = row_of(database, made), len(notes_of(database, made))

    assert not make(database, made)

    assert row_of(database, made) == before
    assert len(notes_of(database, made)) == noted


@pytest.mark.parametrize(("move", "make"), EACH_WAY)
def test_a_move_that_is_repeated_is_made_and_noted_once(
    database: Database, move: str, make: Callable[[Database, Made], object]
) -> None:
    made = make_run(database, state=min(MOVES[move].sources))
    advance(database, timedelta(days=1))
    make(database, made)
    first, noted = row_of(database, made), notes_of(database, made)

    make(database, made)

    assert row_of(database, made) == first
    assert notes_of(database, made) == noted


@pytest.mark.parametrize("move", ["succeed", "fail", "cancel"])
def test_a_finish_that_is_repeated_after_a_lost_answer_still_says_that_it_is_ours(
    database: Database, move: str
) -> None:
    made = make_run(database, state=RunState.RUNNING)

    assert finish(database, made, move)
    assert finish(database, made, move)


def test_a_finish_does_not_pass_for_ours_when_the_run_ended_otherwise(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    finish(database, made, "fail")

    assert not finish(database, made, "succeed")


def envelope_of(database: Database, made: Made) -> str:
    return database.once(lambda conn: runs.envelopes(conn, [made.id]))[made.id].envelope


# -- start ------------------------------------------------------------------------------------------


def test_a_new_run_is_pending_with_its_message_and_due_when_that_counts_as_lost(database: Database) -> None:
    made = make_run(database, envelope='{"body": "hello"}', tags='["vip"]', parent_id="p", root_id="r")

    found = database.once(lambda conn: queries.get(conn, made.id))

    assert found is not None
    assert (found.state, found.attempt, found.queue, found.version) == (RunState.PENDING, 1, "celery", "v1")
    assert (found.tags, found.parent_id, found.root_id) == (("vip",), "p", "r")
    assert envelope_of(database, made) == '{"body": "hello"}'
    assert not due(database)
    advance(database, RESEND)
    assert [one.id for one in due(database)] == [made.id]


def test_starting_the_same_id_again_changes_nothing(database: Database) -> None:
    made = make_run(database, state=RunState.SUCCEEDED)
    before = row_of(database, made)
    again = new_run(made.id, task="other", envelope="{}")

    assert not database.once(lambda conn: runs.start(conn, again, due_in=RESEND))

    assert row_of(database, made) == before
    assert envelope_of(database, made) == made.new.envelope


def test_an_instant_wins_over_a_length(database: Database) -> None:
    at = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
    new = new_run()

    database.once(lambda conn: runs.start(conn, new, due_in=RESEND, due_at=at, delayed=True))

    found = database.once(lambda conn: queries.get(conn, new.id))
    assert found is not None
    assert (found.state, found.wake_at) == (RunState.DELAYED, at)


# -- claim ------------------------------------------------------------------------------------------


def test_a_claim_raises_the_epoch_and_names_its_owner(database: Database) -> None:
    made = make_run(database)

    claim = take(database, made)

    assert claim is not None
    assert (claim.epoch, claim.state, claim.attempt, claim.first_attempt) == (1, RunState.RUNNING, 1, 1)
    row = row_of(database, made)
    assert (row.worker, row.process, row.epoch) == (WORKER, PROCESS, 1)
    assert row.started_at is not None


def test_a_stored_run_is_claimed_with_its_records(database: Database) -> None:
    made = make_run(database, state=RunState.WAITING, records=[make_record("charge")])
    advance(database, timedelta(days=1))
    wake(database, made)

    claim = claim_stored(database, made.id)

    assert claim is not None
    assert (claim.epoch, claim.state) == (made.epoch + 1, RunState.RUNNING)
    assert [record.key for record in claim.records] == ["charge"]
    assert (row_of(database, made).version, notes_of(database, made)[-1][:2]) == ("v2", ("claim", WORKER))


@each_state
def test_a_stored_run_is_claimed_from_the_sources_of_a_claim_only(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)
    advance(database, timedelta(days=1))

    claim = claim_stored(database, made.id)

    assert (claim is not None) == (state in MOVES["claim"].sources)


def test_a_claim_of_a_stored_run_stores_none(database: Database) -> None:
    assert claim_stored(database, "nobody") is None
    assert not database.once(lambda conn: runs.exists(conn, "nobody"))


def claim_stored(database: Database, run_id: str) -> Claim | None:
    return database.once(
        lambda conn: runs.claim(conn, run_id, worker=WORKER, process=PROCESS, lease=LEASE, version="v2")
    )


def test_a_run_that_no_producer_stored_is_stored_by_its_claim(database: Database) -> None:
    made = Made("sent-before-the-upgrade", 0, new_run("sent-before-the-upgrade", tags='["vip"]'))

    claim = take(database, made)

    assert claim is not None
    assert (claim.epoch, claim.records) == (1, [])
    found = database.once(lambda conn: queries.get(conn, made.id))
    assert found is not None
    assert (found.state, found.tags) == (RunState.RUNNING, ("vip",))
    assert envelope_of(database, made) == made.new.envelope
    assert [note[0] for note in notes_of(database, made)] == ["claim"]


def test_a_claim_reads_every_record_in_the_order_in_which_they_were_made(database: Database) -> None:
    records = [make_record(key, seq=seq, output=f'"{key}"') for seq, key in enumerate(["zeta", "alpha", "mid"], 1)]
    made = make_run(database, state=RunState.WAITING, records=records)
    advance(database, HOUR)
    wake(database, made)

    claim = take(database, made)

    assert claim is not None
    assert [(record.key, record.seq, record.output) for record in claim.records] == [
        ("zeta", 1, '"zeta"'),
        ("alpha", 2, '"alpha"'),
        ("mid", 3, '"mid"'),
    ]


@pytest.mark.parametrize("state", sorted(TERMINAL - {RunState.EXPIRED}))
def test_an_ended_run_that_was_not_delivered_is_claimed_to_deliver_it_without_running(
    database: Database, state: RunState
) -> None:
    made = make_run(database, state=state, is_delivered=False)
    advance(database, HOUR)
    assert send_again(database, made) == [made.id]

    claim = take(database, made, worker="w2")

    assert claim is not None
    assert claim.state is state
    assert state_of(database, made) is state
    assert take(database, made, worker="w3") is None


def test_an_ended_run_is_not_claimed_while_its_own_worker_may_still_deliver_it(database: Database) -> None:
    made = make_run(database, state=RunState.SUCCEEDED, is_delivered=False)

    assert take(database, made, worker="w2") is None


@pytest.mark.parametrize("known", [True, False])
def test_of_two_workers_that_claim_at_once_one_wins(database: Database, known: bool) -> None:
    for _ in range(5):
        made = make_run(database) if known else Made(f"{new_run().id}-unknown", 0, new_run())
        gate = threading.Barrier(2)

        def race(worker: str, made: Made = made, gate: threading.Barrier = gate) -> bool:
            gate.wait(10)
            return take(database, made, worker=worker) is not None

        with ThreadPoolExecutor(2) as pool:
            wins = list(pool.map(race, ["w1", "w2"]))

        assert sorted(wins) == [False, True]


# -- two transactions at once, on PostgreSQL where they can be held open ----------------------------


def when_blocked(database: Database, started: "Future[Any]") -> None:
    """Return once a session of this database waits for a lock."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    for _ in range(1000):
        if database.once(lambda conn: conn.execute(waiting).scalar()):
            return
        if started.done():
            raise AssertionError(f"it did not wait for the lock but returned {started.result()!r}")
        threading.Event().wait(0.01)
    raise AssertionError("nobody waits for a lock")


def meanwhile(
    database: Database, first: Callable[[Connection], object], second: Callable[[], Any]
) -> "tuple[object, Any]":
    """Run `first` in a transaction that commits only once `second` waits for it; return what each returned."""
    with ThreadPoolExecutor(1) as pool, database.engine.connect() as conn:
        with conn.execution_options(isolation_level="READ COMMITTED").begin():
            done = first(conn)
            other = pool.submit(second)
            when_blocked(database, other)
        return done, other.result(20)


def test_a_record_is_not_written_when_the_lease_is_being_taken_away(postgres: Database) -> None:
    made = make_run(postgres, state=RunState.RUNNING)
    advance(postgres, HOUR)

    moved, written = meanwhile(
        postgres,
        lambda conn: runs.recover(conn, seen(made), crashes=1, resend=RESEND),
        lambda: append(postgres, made, make_record()),
    )

    assert (moved, written) == (True, None)
    assert postgres.once(lambda conn: steps.load(conn, made.id)) == []


def test_the_lease_is_not_taken_away_while_a_record_is_being_written(postgres: Database) -> None:
    made = make_run(postgres, state=RunState.RUNNING)
    advance(postgres, HOUR)

    written, moved = meanwhile(
        postgres,
        lambda conn: steps.append(conn, made.id, make_record(), epoch=made.epoch, version="v1"),
        lambda: recover(postgres, made),
    )

    assert (written, moved) == (False, True)
    claim = take(postgres, made, worker="w2")
    assert claim is not None
    assert [record.key for record in claim.records] == ["charge"]


def test_a_claim_sees_a_record_that_was_committed_while_it_waited(postgres: Database) -> None:
    made = make_run(postgres, state=RunState.RUNNING)

    def release_with_a_record(conn: Connection) -> object:
        steps.append(conn, made.id, make_record(), epoch=made.epoch, version="v1")
        return runs.suspend(
            conn, made.id, "release", epoch=made.epoch, who=WORKER, why="stops", version="v1", due_in=RESEND
        )

    moved, claim = meanwhile(postgres, release_with_a_record, lambda: take(postgres, made, worker="w2"))

    assert moved
    assert claim is not None
    assert [record.key for record in claim.records] == ["charge"]


def test_a_claim_that_waited_for_another_claim_is_refused(postgres: Database) -> None:
    made = make_run(postgres)

    first, second = meanwhile(
        postgres,
        lambda conn: runs.claim_or_store(conn, made.new, worker="w1", process=1, lease=LEASE),
        lambda: take(postgres, made, worker="w2"),
    )

    assert first is not None
    assert second is None
    assert row_of(postgres, made).worker == "w1"


def test_a_cancel_is_not_lost_when_the_run_suspends_at_that_moment(postgres: Database) -> None:
    made = make_run(postgres, state=RunState.RUNNING)
    given = {"epoch": made.epoch, "who": WORKER, "why": "sleeps", "version": "v1", "due_in": HOUR}

    moved, answer = meanwhile(
        postgres, lambda conn: runs.suspend(conn, made.id, "suspend", **given), lambda: cancel(postgres, made)
    )

    assert moved
    assert answer is RunState.CANCELLED
    assert state_of(postgres, made) is RunState.CANCELLED


def test_two_passes_at_once_wake_a_run_once(postgres: Database) -> None:
    made = make_run(postgres, state=RunState.WAITING)
    advance(postgres, HOUR)

    first, second = meanwhile(
        postgres, lambda conn: runs.wake(conn, [made.id], resend=RESEND), lambda: wake(postgres, made)
    )

    assert (first, second) == ([made.id], [])


# -- suspend ----------------------------------------------------------------------------------------


def test_a_suspension_and_its_record_are_stored_together(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    record = make_record("sleep", kind="sleep", state="waiting", output=None, wake_in=3600.0)

    assert suspend(database, made, due_in=HOUR, record=record)

    [loaded] = database.once(lambda conn: steps.load(conn, made.id))
    assert loaded.wake_in == pytest.approx(3600, abs=60)
    row = row_of(database, made)
    assert (row.state, row.worker, row.process, row.wait) == ("waiting", None, None, "it waits")


def test_a_refused_suspension_stores_no_record(database: Database) -> None:
    made = make_run(database, state=RunState.CANCELLED)

    assert not suspend(database, made, due_in=HOUR, record=make_record())

    assert database.once(lambda conn: steps.load(conn, made.id)) == []


def test_a_record_that_cannot_be_stored_undoes_the_suspension(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    broken = make_record(seq=None)

    with pytest.raises((sa.exc.IntegrityError, psycopg.IntegrityError)):
        suspend(database, made, due_in=HOUR, record=broken)

    assert state_of(database, made) is RunState.RUNNING
    assert [note[0] for note in notes_of(database, made)] == ["claim"]


def test_only_a_failed_attempt_counts_as_one(database: Database) -> None:
    waits, failed = make_run(database, state=RunState.RUNNING), make_run(database, state=RunState.RUNNING)

    suspend(database, waits, "back_off", due_in=HOUR)
    suspend(database, failed, "back_off", due_in=HOUR, next_attempt=True)

    assert (row_of(database, waits).attempt, row_of(database, failed).attempt) == (1, 2)


# -- outcome and delivery ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "expected"), [("succeed", ("42", None)), ("fail", (None, ERROR)), ("cancel", (None, ERROR))]
)
def test_an_outcome_is_stored_with_its_move(
    database: Database, move: str, expected: tuple[str | None, str | None]
) -> None:
    made = make_run(database, state=RunState.RUNNING)

    finish(database, made, move)

    assert database.once(lambda conn: runs.outcome_of(conn, made.id)) == expected
    row = row_of(database, made)
    assert row.finished_at is not None
    assert row.due_at is not None, "it is not delivered yet"


def test_a_run_that_is_unknown_has_no_outcome(database: Database) -> None:
    assert database.once(lambda conn: runs.outcome_of(conn, "unknown")) == (None, None)


def test_only_the_worker_that_finished_a_run_can_call_it_delivered(database: Database) -> None:
    made = make_run(database, state=RunState.SUCCEEDED, is_delivered=False)

    database.once(lambda conn: runs.delivered(conn, [made.id], worker="w2"))
    assert row_of(database, made).due_at is not None

    database.once(lambda conn: runs.delivered(conn, [made.id], worker=WORKER))
    assert row_of(database, made).due_at is None


@pytest.mark.parametrize("state", sorted(LIVE))
def test_a_run_that_goes_on_is_never_delivered(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)
    before = row_of(database, made)

    database.once(lambda conn: runs.delivered(conn, [made.id], worker=WORKER))

    assert row_of(database, made) == before


def test_a_run_is_held_under_its_present_epoch_only(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    held = [database.once(lambda conn, epoch=epoch: runs.is_held(conn, made.id, epoch)) for epoch in (0, 1, 2)]

    assert held == [False, True, False]


# -- leases -----------------------------------------------------------------------------------------


def test_a_lease_is_prolonged_for_the_runs_of_this_worker_only(database: Database) -> None:
    mine = make_run(database, state=RunState.RUNNING)
    other = make_run(database, state=RunState.RUNNING, worker="w2")
    advance(database, HOUR)

    database.once(lambda conn: runs.renew(conn, {mine.id: PROCESS, other.id: PROCESS}, worker=WORKER, lease=LEASE))

    assert [one.id for one in due(database)] == [other.id]


def test_a_delivered_run_is_not_made_due_again_by_a_late_renewal(database: Database) -> None:
    made = make_run(database, state=RunState.SUCCEEDED)

    database.once(lambda conn: runs.renew(conn, {made.id: PROCESS}, worker=WORKER, lease=LEASE))

    assert row_of(database, made).due_at is None


@pytest.mark.parametrize(
    ("worker", "process", "is_ended"), [(WORKER, PROCESS, True), ("w2", PROCESS, False), (WORKER, 1, False)]
)
def test_a_dead_process_ends_the_leases_that_it_held_itself(
    database: Database, worker: str, process: int, is_ended: bool
) -> None:
    made = make_run(database, state=RunState.RUNNING)

    database.once(lambda conn: runs.expire_lease(conn, made.id, worker=worker, process=process))

    assert bool(due(database)) is is_ended


# -- the sweeper's moves ----------------------------------------------------------------------------


def test_what_is_due_comes_longest_overdue_first_and_no_more_than_asked_for(database: Database) -> None:
    made = []
    for _ in range(3):
        made.append(make_run(database))
        advance(database, timedelta(seconds=1))
    later = make_run(database, state=RunState.WAITING)
    advance(database, timedelta(minutes=1))

    assert [one.id for one in due(database)] == [one.id for one in made]
    assert [one.id for one in due(database, limit=2)] == [one.id for one in made[:2]]
    assert later.id not in [one.id for one in due(database)]


@each_state
def test_whatever_is_not_over_has_a_moment_at_which_it_is_looked_at(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)

    assert (row_of(database, made).due_at is None) is (state in TERMINAL)


def test_a_wait_without_a_time_is_never_due(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    suspend(database, made)
    advance(database, timedelta(days=1000))

    assert due(database) == []
    assert wake(database, made) == []


def test_records_are_counted_for_runs_that_run(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record("a"), make_record("b", seq=2)])
    advance(database, HOUR)

    [found] = due(database)

    assert (found.id, found.records, found.epoch, found.crash_mark) == (made.id, 2, made.epoch, 0)


@pytest.mark.parametrize("state", sorted(SUSPENDED))
def test_a_suspended_run_is_not_woken_before_its_time(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)

    assert wake(database, made) == []

    advance(database, HOUR)
    assert wake(database, made) == [made.id]
    assert (row_of(database, made).wait, row_of(database, made).sends) == (None, 0)


def test_a_running_run_is_not_recovered_before_its_lease_ran_out(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    assert not recover(database, made)
    assert not fail_lost(database, made)

    assert state_of(database, made) is RunState.RUNNING


def test_a_run_is_not_recovered_after_its_owner_renewed_the_lease(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    advance(database, HOUR)
    [found] = due(database)
    database.once(lambda conn: runs.renew(conn, {made.id: PROCESS}, worker=WORKER, lease=LEASE))

    assert not database.once(lambda conn: runs.recover(conn, found, crashes=1, resend=RESEND))


def test_the_time_until_a_message_is_sent_again_doubles_up_to_64_times(database: Database) -> None:
    made = make_run(database)
    waits = []

    for _ in range(9):
        advance(database, timedelta(days=1))
        assert send_again(database, made) == [made.id]
        at = database.once(lambda conn: conn.execute(sa.select(run.c.due_at)).scalar_one())
        waits.append((at - now_of(database)).total_seconds())

    assert waits == pytest.approx([5, 10, 20, 40, 80, 160, 320, 320, 320], abs=4)


def now_of(database: Database) -> datetime:
    """Return the store's clock."""
    found = database.once(lambda conn: conn.execute(sa.select(sa.type_coerce(now(), run.c.due_at.type))).scalar_one())
    assert isinstance(found, datetime)
    return found


def test_a_message_that_is_not_overdue_is_not_sent_again(database: Database) -> None:
    made = make_run(database)

    assert send_again(database, made) == []


def test_a_claim_makes_the_back_off_of_the_message_start_anew(database: Database) -> None:
    made = make_run(database)
    for _ in range(3):
        advance(database, timedelta(days=1))
        send_again(database, made)

    take(database, made)

    assert row_of(database, made).sends == 0


def test_a_recovery_keeps_what_it_counted(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record()])
    advance(database, HOUR)

    assert recover(database, made, crashes=3, records=1)

    row = row_of(database, made)
    assert (row.state, row.worker, row.crashes, row.crash_mark) == ("pending", None, 3, 1)


def test_a_run_fails_as_a_crash_loop_only_after_recoveries_without_a_new_record(sqlite: Database) -> None:
    app = Celery("crashes", broker="memory://", set_as_current=False)
    durable = Durable(app, store_url=sqlite.url.render_as_string(), max_crashes=2)
    made = make_run(sqlite, envelope=_envelope())

    def crash(record: str | None = None) -> int:
        claim = take(sqlite, made)
        assert claim is not None
        if record is not None:
            held = Made(made.id, claim.epoch, made.new)
            append(sqlite, held, make_record(record, seq=len(claim.records) + 1))
        advance(sqlite, HOUR)
        with app.producer_or_acquire() as producer:
            sweep(app, durable.runtime, producer, trust_leases=True)
        return int(row_of(sqlite, made).crashes)

    assert [crash(), crash(), crash("a"), crash(), crash("b"), crash()] == [1, 2, 1, 2, 1, 2]
    assert state_of(sqlite, made) is RunState.PENDING
    crash()

    row = row_of(sqlite, made)
    assert (row.state, row.error_code) == ("failed", "crash_loop")
    assert "died 3 times without a new record" in (notes_of(sqlite, made)[-1][2] or "")
    durable.runtime.database.close()


def _envelope() -> str:
    options = {"headers": {"id": "x", "task": "t"}, "serializer": "json", "routing_key": "celery"}
    return Envelope.of_publish(([], {}, {}), options).to_text()


def test_leases_are_not_judged_while_workers_could_not_renew_them(sqlite: Database) -> None:
    app = Celery("outage", broker="memory://", set_as_current=False)
    durable = Durable(app, store_url=sqlite.url.render_as_string())
    made = make_run(sqlite, state=RunState.RUNNING, envelope=_envelope())
    advance(sqlite, HOUR)

    with app.producer_or_acquire() as producer:
        moved = sweep(app, durable.runtime, producer, trust_leases=False)

    assert moved == 0
    assert state_of(sqlite, made) is RunState.RUNNING
    durable.runtime.database.close()


# -- the moves of people ----------------------------------------------------------------------------


@each_state
def test_a_cancel_says_whether_it_won(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)

    answer = cancel(database, made)

    if state is RunState.RUNNING:
        assert answer is RunState.RUNNING
    else:
        assert answer is (RunState.CANCELLED if state in LIVE else None)


def test_a_cancel_of_an_unknown_run_says_that_it_did_nothing(database: Database) -> None:
    assert cancel(database, Made("unknown", 0, new_run())) is None


def test_the_owner_of_a_run_learns_of_a_cancel_when_it_writes_its_next_record(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    cancel(database, made)

    assert append(database, made, make_record()) is True


def test_the_next_owner_of_a_run_learns_of_a_cancel_when_it_claims_it(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    cancel(database, made)
    advance(database, HOUR)
    recover(database, made)

    claim = take(database, made)

    assert claim is not None
    assert claim.cancel_requested


def test_a_request_to_cancel_a_running_run_is_in_its_history(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    cancel(database, made)

    what, who, why, epoch = notes_of(database, made)[-1]
    assert what != "claim"
    assert (who, why, epoch) == ("ann", "no longer wanted", made.epoch)


def test_a_cancelled_run_is_handed_to_a_worker_that_tells_celery(database: Database) -> None:
    made = make_run(database, state=RunState.WAITING)

    cancel(database, made)

    claim = take(database, made)
    assert claim is not None
    assert claim.state is RunState.CANCELLED


def test_a_message_that_expired_ends_no_run_that_has_begun(database: Database) -> None:
    made = make_run(database, state=RunState.WAITING)
    advance(database, HOUR)
    wake(database, made)

    discard(database, made, expired=True)

    assert state_of(database, made) is RunState.PENDING


def test_a_cancelled_run_whose_message_celery_discarded_counts_as_told(database: Database) -> None:
    made = make_run(database, state=RunState.PENDING)
    cancel(database, made)

    discard(database, made, expired=False)

    assert row_of(database, made).due_at is None


def test_the_time_limit_ends_only_runs_of_the_worker_that_enforces_it(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    assert not time_out(database, made, worker="w2")
    assert time_out(database, made)

    row = row_of(database, made)
    assert (row.state, row.error_code, row.due_at) == ("failed", "timeout", None)


def test_a_retry_gives_a_fresh_budget_and_keeps_the_records(database: Database) -> None:
    made = make_run(database, state=RunState.FAILED, records=[make_record()])

    assert retry(database, made)

    claim = take(database, made)
    assert claim is not None
    assert (claim.attempt, claim.first_attempt) == (2, 2)
    assert [record.key for record in claim.records] == ["charge"]
    row = row_of(database, made)
    assert (row.error_code, row.finished_at, row.crashes) == (None, None, 0)


def test_a_retried_run_shows_no_outcome_of_its_earlier_end(database: Database) -> None:
    made = make_run(database, state=RunState.FAILED)

    retry(database, made)

    found = database.once(lambda conn: queries.get(conn, made.id))
    assert found is not None
    assert (found.state, found.error_code, found.error) == (RunState.PENDING, None, None)


def test_a_retry_forgets_that_a_cancel_was_asked_for(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    cancel(database, made)
    finish(database, made, "cancel")

    retry(database, made)

    claim = take(database, made)
    assert claim is not None
    assert not claim.cancel_requested


# -- messages ---------------------------------------------------------------------------------------


def test_stored_messages_say_whether_their_run_was_ever_begun(database: Database) -> None:
    fresh, begun = make_run(database), make_run(database, state=RunState.WAITING)

    found = database.once(lambda conn: runs.envelopes(conn, [fresh.id, begun.id, "unknown"]))

    assert {key: stored.is_begun for key, stored in found.items()} == {fresh.id: False, begun.id: True}


def test_a_message_can_be_given_new_arguments(database: Database) -> None:
    made, other = make_run(database), make_run(database)

    database.once(lambda conn: runs.replace_message(conn, made.id, "changed"))

    found = database.once(lambda conn: runs.envelopes(conn, [made.id, other.id]))
    assert (found[made.id].envelope, found[other.id].envelope) == ("changed", other.new.envelope)


def test_a_replaced_run_is_gone_but_for_its_history(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record()])

    assert database.once(lambda conn: runs.replace(conn, made.id, epoch=made.epoch, who=WORKER))

    left = [
        database.once(lambda conn, table=table: conn.execute(sa.select(sa.func.count()).select_from(table)).scalar())
        for table in (run, message, step, outcome)
    ]
    assert left == [0, 0, 0, 0]
    assert notes_of(database, made)[-1] == ("replace", WORKER, None, 1)


def test_only_its_owner_can_replace_a_run(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    assert not database.once(lambda conn: runs.replace(conn, made.id, epoch=made.epoch - 1, who=WORKER))

    assert state_of(database, made) is RunState.RUNNING


# -- history ----------------------------------------------------------------------------------------


def test_the_history_says_who_made_each_move_why_and_under_which_epoch(database: Database) -> None:
    made = make_run(database, state=RunState.WAITING)
    advance(database, HOUR)
    wake(database, made)
    take(database, made, worker="w2")
    advance(database, HOUR)
    recover(database, Made(made.id, 2, made.new))
    cancel(database, made)
    retry(database, made)

    assert notes_of(database, made) == [
        ("claim", "w1", None, 1),
        ("suspend", "w1", "it waits", 1),
        ("wake", "sweeper", None, 1),
        ("claim", "w2", None, 2),
        ("recover", "sweeper", "the lease ran out", 2),
        ("cancel", "ann", "no longer wanted", 2),
        ("retry", "ann", "the bug is fixed", 2),
    ]
