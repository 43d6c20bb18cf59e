"""The statements of every move of a run.

A move is one guarded statement: it names the states it may leave and, for the owner of a run, the epoch
under which it holds it. Apart from the claim, which may have to store the run, `_moved` makes them all.
`due_at` is set by each to the moment at which the sweeper must look at the run next, and is null when never.
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import FromClause

from celery_durable.states import MOVES, TERMINAL, RunState
from celery_durable.store import steps
from celery_durable.store.expressions import Instant, now
from celery_durable.store.statements import Together, bind, per_dialect
from celery_durable.store.tables import history, idempotency, message, outcome, run, step

_MOST_DOUBLINGS = 6


def _later(name: str) -> now:
    return now(bind(name, sa.Float))


_RUN_ID = bind("run_id")

_EPOCH = bind("epoch", sa.Integer)

_DUE = sa.func.coalesce(bind("due_at", Instant), _later("due_in"), type_=Instant)


def _moved(move: str, *guards: ColumnElement[bool], **values: Any) -> UpdateBase:
    """Return the guarded UPDATE of one move; no other statement but the claim changes a state."""
    target = MOVES[move]
    statement = sa.update(run).where(run.c.state.in_(target.sources), *guards).values(state=target.target, **values)
    return statement.returning(run.c.id, run.c.epoch, run.c.version)


def _owned(move: str, **values: Any) -> Any:
    """Return the UPDATE of a move out of `running`, which only the owner of the epoch may make."""
    return _moved(move, run.c.id == _RUN_ID, run.c.epoch == _EPOCH, run.c.state == RunState.RUNNING, **values)


def _note(
    what: str, *, who: Any = None, why: Any = None, version: Any = None, while_running: str | None = None
) -> Callable[[FromClause], UpdateBase]:
    """Return the insert of the history row of a move; one that left the run running is named differently."""

    def make(moved: FromClause) -> UpdateBase:
        columns = {
            "run_id": moved.c.id,
            "what": sa.literal(what)
            if while_running is None
            else sa.case((moved.c.state == RunState.RUNNING, while_running), else_=what),
            "who": bind("who") if who is None else who,
            "why": sa.null() if why is None else why,
            "epoch": moved.c.epoch,
            "version": moved.c.version if version is None else version,
        }
        return sa.insert(history).from_select([*columns], sa.select(*columns.values()))

    return make


def _keep_message(insert: Any, *, first_only: bool) -> Callable[[FromClause], UpdateBase]:
    def make(moved: FromClause) -> UpdateBase:
        names = ("envelope", "group_id", "parent_id", "root_id", "tags", "idempotency_key")
        columns = {name: bind(name) for name in names}
        source = sa.select(moved.c.id, *columns.values()).where(moved.c.epoch == 1 if first_only else sa.true())
        statement: UpdateBase = insert(message).from_select(["run_id", *columns], source)
        return statement.on_conflict_do_nothing(index_elements=[message.c.run_id])  # type: ignore[attr-defined,no-any-return]

    return make


def _keep_outcome(insert: Any) -> Callable[[FromClause], UpdateBase]:
    def make(moved: FromClause) -> UpdateBase:
        source = sa.select(moved.c.id, bind("result"), bind("error")).where(sa.true())
        statement = insert(outcome).from_select(["run_id", "result", "error"], source)
        excluded = statement.excluded
        kept: UpdateBase = statement.on_conflict_do_update(
            index_elements=[outcome.c.run_id], set_={"result": excluded.result, "error": excluded.error}
        )
        return kept

    return make


@per_dialect
def start(insert: Any) -> Together:
    """Return the statement that stores a new run and its message."""
    first = insert(run).values(
        id=_RUN_ID, task=bind("task"), state=bind("state"), due_at=_DUE, queue=bind("queue"), version=bind("version")
    )
    return Together(
        first.on_conflict_do_nothing(index_elements=[run.c.id]).returning(run.c.id),
        [_keep_message(insert, first_only=False)],
    )


@per_dialect
def start_once(insert: Any) -> Together:
    """Return the statement that stores a new run and its message unless its key is taken."""
    taken = insert(idempotency).values(
        key=bind("idempotency_key"),
        run_id=_RUN_ID,
        task=bind("task"),
        fingerprint=bind("fingerprint"),
        expires_at=_later("ttl"),
    )
    first = taken.on_conflict_do_update(
        index_elements=[idempotency.c.key],
        set_={name: taken.excluded[name] for name in ("run_id", "task", "fingerprint", "expires_at")},
        where=idempotency.c.expires_at <= now(),
    )

    def keep_run(moved: FromClause) -> UpdateBase:
        columns = {"task": bind("task"), "state": bind("state"), "due_at": _DUE, "queue": bind("queue")}
        columns["version"] = bind("version")
        source = sa.select(moved.c.id, *columns.values()).where(sa.true())
        statement: UpdateBase = insert(run).from_select(["id", *columns], source)
        return statement.on_conflict_do_nothing(index_elements=[run.c.id])  # type: ignore[attr-defined,no-any-return]

    return Together(
        first.returning(idempotency.c.run_id.label("id")), [keep_run, _keep_message(insert, first_only=False)]
    )


_IS_READY = sa.and_(
    run.c.state.in_(MOVES["claim"].sources), sa.or_(run.c.state != RunState.DELAYED, run.c.due_at <= now())
)
_IS_CLAIMABLE = sa.or_(_IS_READY, sa.and_(run.c.state.in_(TERMINAL), run.c.due_at.is_not(None), run.c.worker.is_(None)))


def _claimed() -> dict[str, Any]:
    """Return what a claim changes; one in a terminal state is claimed to deliver its outcome."""
    return {
        "state": sa.case((_IS_READY, RunState.RUNNING), else_=run.c.state),
        "epoch": run.c.epoch + 1,
        "due_at": _later("lease"),
        "worker": bind("worker"),
        "process": bind("process", sa.Integer),
        "version": sa.case((_IS_READY, bind("version")), else_=run.c.version),
        "started_at": sa.func.coalesce(run.c.started_at, now()),
        "sends": 0,
        "wait": None,
    }


def _returned() -> list[Any]:
    seen = run.alias("seen")
    return [
        run.c.id,
        run.c.epoch,
        run.c.state,
        run.c.attempt,
        run.c.first_attempt,
        run.c.cancel_requested,
        sa.select(seen.c.epoch).where(seen.c.id == _RUN_ID).scalar_subquery().label("seen_epoch"),
        sa.select(seen.c.state).where(seen.c.id == _RUN_ID).scalar_subquery().label("seen_state"),
        steps.all_as_json().label("records"),
    ]


_NOTE_CLAIM = _note("claim", who=bind("worker"), version=bind("version"))

CLAIM = Together(
    sa.update(run).where(run.c.id == _RUN_ID, _IS_CLAIMABLE).values(**_claimed()).returning(*_returned()),
    [_NOTE_CLAIM],
)


@per_dialect
def claim_or_store(insert: Any) -> Together:
    """Return the statement of a claim that stores the run first where its producer did not."""
    inserted = insert(run).values(
        id=_RUN_ID,
        task=bind("task"),
        state=RunState.RUNNING,
        epoch=1,
        due_at=_later("lease"),
        worker=bind("worker"),
        process=bind("process", sa.Integer),
        queue=bind("queue"),
        version=bind("version"),
        started_at=now(),
    )
    claimed = inserted.on_conflict_do_update(index_elements=[run.c.id], set_=_claimed(), where=_IS_CLAIMABLE)
    return Together(claimed.returning(*_returned()), [_keep_message(insert, first_only=True), _NOTE_CLAIM])


@per_dialect
def suspend(insert: Any, move: str, with_record: bool, next_attempt: bool) -> Together:
    """Return the statement that gives a running run up until its time."""
    more = {"attempt": run.c.attempt + 1} if next_attempt else {}
    # A cancel that was asked for since the last record must not wait for the end of this wait.
    due_at = sa.case((run.c.cancel_requested, now()), else_=_DUE)
    moved = _owned(move, due_at=due_at, wait=bind("why"), worker=None, process=None, **more)
    then = [_note(move, why=bind("why"))]
    if with_record:
        then.append(steps.dependent(insert, _EPOCH))
    return Together(moved, then)


@per_dialect
def finish(insert: Any, move: str) -> Together:
    """Return the statement that records the outcome of a running run."""
    moved = _owned(move, due_at=_DUE, error_code=bind("error_code"), finished_at=now(), wait=None)
    return Together(moved, [_note(move, why=bind("why")), _keep_outcome(insert)])


DELIVERED = (
    sa.update(run)
    .where(
        run.c.id.in_(bind("ids", expanding=True)),
        run.c.worker == bind("worker"),
        run.c.state.in_(TERMINAL),
    )
    .values(due_at=None)
)

RENEW = (
    sa.update(run)
    .where(
        sa.tuple_(run.c.id, run.c.process).in_(bind("held", None, expanding=True)),
        run.c.worker == bind("worker"),
        run.c.due_at.is_not(None),
    )
    .values(due_at=_later("lease"))
)

SELECT_DUE = (
    sa.select(
        run.c.id,
        run.c.state,
        run.c.epoch,
        run.c.crashes,
        run.c.crash_mark,
        sa.case(
            (
                run.c.state == RunState.RUNNING,
                sa.select(sa.func.count()).where(step.c.run_id == run.c.id).scalar_subquery(),
            ),
            else_=0,
        ),
        run.c.queue,
        run.c.sends,
    )
    .where(run.c.due_at <= now())
    .order_by(run.c.due_at)
    .limit(bind("most", sa.Integer))
)


@per_dialect
def fail_lost(insert: Any) -> Together:
    """Return the statement that fails a run whose lease ran out."""
    values = {"due_at": _DUE, "error_code": bind("error_code"), "finished_at": now(), "worker": None, "process": None}
    moved = _owned("fail", **values).where(run.c.due_at <= now())
    return Together(moved, [_note("fail", why=bind("why")), _keep_outcome(insert)])


@per_dialect
def give_up(insert: Any) -> Together:
    """Return the statement that fails a pending run whose message cannot be sent."""
    values = {"due_at": None, "error_code": "payload", "finished_at": now()}
    moved = _moved("give_up", run.c.id == _RUN_ID, **values)
    return Together(moved, [_note("give_up", why=bind("why")), _keep_outcome(insert)])


@per_dialect
def time_out(insert: Any) -> Together:
    """Return the statement that fails a run whose process the hard time limit killed."""
    values = {"due_at": None, "error_code": "timeout", "finished_at": now()}
    moved = _moved("fail", run.c.id == _RUN_ID, run.c.worker == bind("who"), **values)
    return Together(moved, [_note("fail", why=bind("why")), _keep_outcome(insert)])


_IN_IDS = run.c.id.in_(bind("ids", expanding=True))

_BY_SWEEPER: dict[str, Any] = {"who": sa.literal("sweeper")}

WAKE = Together(
    _moved("wake", _IN_IDS, run.c.due_at <= now(), due_at=_later("resend"), wait=None, sends=0),
    [_note("wake", **_BY_SWEEPER)],
)

SEND_AGAIN = (
    sa.update(run)
    .where(_IN_IDS, run.c.due_at <= now(), run.c.state.in_([RunState.PENDING, *TERMINAL]))
    .values(
        sends=run.c.sends + 1,
        worker=None,
        due_at=now(
            bind("resend", sa.Float)
            * sa.literal(1).bitwise_lshift(sa.case((run.c.sends < _MOST_DOUBLINGS, run.c.sends), else_=_MOST_DOUBLINGS))
        ),
    )
    .returning(run.c.id)
)

RECOVER = Together(
    _owned(
        "recover",
        due_at=_DUE,
        worker=None,
        process=None,
        crashes=bind("crashes", sa.Integer),
        crash_mark=bind("crash_mark", sa.Integer),
    ).where(run.c.due_at <= now()),
    [_note("recover", why=sa.literal("the lease ran out"), **_BY_SWEEPER)],
)

_IS_RUNNING = run.c.state == RunState.RUNNING

# One statement for both cases: a run that stops running in between is then found in its new state.
CANCEL = Together(
    sa.update(run)
    .where(run.c.id == _RUN_ID, run.c.state.in_(MOVES["cancel"].sources))
    .values(
        state=sa.case((_IS_RUNNING, run.c.state), else_=MOVES["cancel"].target),
        cancel_requested=True,
        due_at=sa.case((_IS_RUNNING, run.c.due_at), else_=_DUE),
        finished_at=sa.case((_IS_RUNNING, run.c.finished_at), else_=now()),
        wait=sa.case((_IS_RUNNING, run.c.wait), else_=sa.null()),
        worker=sa.case((_IS_RUNNING, run.c.worker), else_=sa.null()),
    )
    .returning(run.c.id, run.c.epoch, run.c.version, run.c.state),
    [_note("cancel", why=bind("why"), while_running="ask_to_cancel")],
)

EXPIRE = Together(
    _moved("expire", run.c.id == _RUN_ID, run.c.epoch == 0, due_at=None, finished_at=now()),
    [_note("expire", why=bind("why"))],
)

REVOKE = Together(
    _moved("cancel", run.c.id == _RUN_ID, due_at=None, finished_at=now(), wait=None),
    [_note("cancel", why=bind("why"))],
)

RETRY = Together(
    _moved(
        "retry",
        run.c.id == _RUN_ID,
        due_at=_DUE,
        attempt=run.c.attempt + 1,
        first_attempt=run.c.attempt + 1,
        crashes=0,
        sends=0,
        error_code=None,
        finished_at=None,
        worker=None,
        cancel_requested=False,
    ),
    [_note("retry", why=bind("why"))],
)

SELECT_ENVELOPES = (
    sa.select(run.c.id, message.c.envelope, run.c.attempt, run.c.epoch)
    .join(message, message.c.run_id == run.c.id)
    .where(run.c.id.in_(bind("ids", expanding=True)))
)

SELECT_OLD = (
    sa.select(run.c.id)
    .where(run.c.created_at < _later("keep"), run.c.state.in_(TERMINAL), run.c.due_at.is_(None))
    .order_by(run.c.created_at)
    .limit(bind("most", sa.Integer))
    .with_for_update(skip_locked=True)
)
