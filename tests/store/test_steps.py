"""What a run has recorded is fenced by its epoch, read back whole, and never taken back."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from celery_durable.states import RunState, StepState
from celery_durable.store import runs, steps
from celery_durable.store.database import Database
from celery_durable.store.runs import Due
from celery_durable.store.steps import Record
from celery_durable.store.tables import step
from tests.factory import RESEND, Made, advance, append, make_record, make_run, take


def load(database: Database, made: Made) -> list[Record]:
    return database.once(lambda conn: steps.load(conn, made.id))


def lose(database: Database, made: Made) -> None:
    """Let the lease of a run end, and give the run to another worker."""
    advance(database, timedelta(hours=1))
    lost = Due(made.id, RunState.RUNNING, made.epoch, 0, 0, 0, None)
    assert database.once(lambda conn: runs.recover(conn, lost, crashes=1, resend=RESEND))
    assert take(database, made, worker="w2") is not None


def test_a_record_comes_back_as_it_was_written(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    written = make_record(
        "charge#2",
        seq=7,
        name="charge",
        attempts=3,
        run_attempt=2,
        output='{"text": "Zürich 🚀 \\"quoted\\" \\\\u0041", "n": [1, 2.5, null, true]}',
        fingerprint="00ff",
    )

    append(database, made, written)

    assert load(database, made) == [written]


@pytest.mark.parametrize("state", [state for state in RunState if state is not RunState.RUNNING])
def test_a_record_is_written_while_the_run_runs_and_at_no_other_time(database: Database, state: RunState) -> None:
    made = make_run(database, state=state)

    assert append(database, made, make_record()) is None

    assert load(database, made) == []


def test_a_worker_that_lost_its_lease_can_record_nothing(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)
    lose(database, made)

    assert append(database, made, make_record()) is None

    assert load(database, made) == []


def test_a_worker_that_lost_its_lease_cannot_change_a_failed_record(database: Database) -> None:
    failed = make_record(state=StepState.FAILED, output=None, error="{}")
    made = make_run(database, state=RunState.RUNNING, records=[failed])
    lose(database, made)

    assert append(database, made, make_record(attempts=2)) is None

    assert load(database, made) == [failed]


def test_a_record_that_succeeded_is_never_written_again(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record(output='"first"')])

    assert append(database, made, make_record(output='"second"')) is None

    assert [record.output for record in load(database, made)] == ['"first"']


@pytest.mark.parametrize("state", [state for state in StepState if state is not StepState.SUCCEEDED])
def test_a_record_that_has_not_succeeded_gives_way_to_a_later_attempt(database: Database, state: StepState) -> None:
    earlier = make_record(state=state, output=None, error="{}", wake_in=5.0)
    made = make_run(database, state=RunState.RUNNING, records=[earlier])
    later = make_record(attempts=2, output='"done"')

    assert append(database, made, later) is False

    assert load(database, made) == [later]


def test_records_of_other_runs_are_not_read(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record()])
    make_run(database, state=RunState.RUNNING, records=[make_record("other")])

    assert [record.key for record in load(database, made)] == ["charge"]


def test_a_wait_is_measured_by_the_clock_of_the_store(database: Database) -> None:
    wait = make_record("sleep", kind="sleep", state=StepState.WAITING, output=None, wake_in=600.0)
    made = make_run(database, state=RunState.RUNNING, records=[wait])

    advance(database, timedelta(minutes=4))

    [loaded] = load(database, made)
    assert loaded.wake_in == pytest.approx(360, abs=30)


def test_an_instant_wins_over_a_length_and_is_kept_to_the_millisecond(database: Database) -> None:
    at = datetime(2100, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    wait = make_record("sleep", kind="sleep", state=StepState.WAITING, output=None, wake_in=1.0, wake_at=at)
    made = make_run(database, state=RunState.RUNNING, records=[wait])

    stored = database.once(
        lambda conn: conn.execute(sa.select(step.c.wake_at).where(step.c.run_id == made.id)).scalar_one()
    )

    assert stored == at


def test_a_step_that_took_long_began_earlier_than_it_was_recorded(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record(took=timedelta(seconds=90))])

    [row] = database.once(lambda conn: steps.of_runs(conn, [made.id]))

    assert (row.finished_at - row.started_at).total_seconds() == pytest.approx(90, abs=0.1)


@pytest.mark.parametrize("state", StepState)
def test_a_record_has_an_end_once_it_is_over(database: Database, state: StepState) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record(state=state)])

    [row] = database.once(lambda conn: steps.of_runs(conn, [made.id]))

    assert (row.finished_at is not None) is (state in (StepState.SUCCEEDED, StepState.FAILED))


def test_a_record_says_under_which_epoch_and_version_it_was_made(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING, records=[make_record()])

    [row] = database.once(lambda conn: steps.of_runs(conn, [made.id]))

    assert (row.epoch, row.version) == (made.epoch, "v1")


def test_an_output_of_a_megabyte_comes_back_whole(database: Database) -> None:
    output = '"' + "é" * 500_000 + '"'
    made = make_run(database, state=RunState.RUNNING, records=[make_record(output=output)])

    [loaded] = load(database, made)

    assert loaded.output == output


def test_a_thousand_records_come_back_in_order(database: Database) -> None:
    made = make_run(database, state=RunState.RUNNING)

    def write(conn: sa.Connection) -> None:
        for seq in range(1, 1001):
            steps.append(conn, made.id, make_record(f"k{1001 - seq}", seq=seq), epoch=made.epoch, version="v1")

    database.atomically(write)

    assert [record.seq for record in load(database, made)] == list(range(1, 1001))
