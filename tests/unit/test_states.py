"""The table of moves is sound: nothing is unreachable, nothing leaves its end but by a retry."""

import pytest

from celery_durable.states import LIVE, MOVES, SUSPENDED, TERMINAL, RunState, diagram


def test_a_state_is_either_live_or_an_end() -> None:
    assert frozenset(RunState) == LIVE | TERMINAL
    assert not LIVE & TERMINAL
    assert SUSPENDED < LIVE


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_an_end_is_left_by_a_retry_only(state: RunState) -> None:
    assert {name for name, move in MOVES.items() if state in move.sources} <= {"retry"}


def test_a_success_is_never_left() -> None:
    assert not [name for name, move in MOVES.items() if RunState.SUCCEEDED in move.sources]


@pytest.mark.parametrize("state", sorted(LIVE))
def test_every_live_state_can_be_cancelled(state: RunState) -> None:
    assert state in MOVES["cancel"].sources


@pytest.mark.parametrize("state", sorted(SUSPENDED))
def test_every_suspended_state_can_be_woken(state: RunState) -> None:
    assert state in MOVES["wake"].sources


def test_only_a_claim_makes_a_run_run() -> None:
    assert [name for name, move in MOVES.items() if move.target is RunState.RUNNING] == ["claim"]


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_every_end_can_be_reached(state: RunState) -> None:
    assert [name for name, move in MOVES.items() if move.target is state]


def test_the_diagram_shows_every_move_once() -> None:
    lines = [line.strip() for line in diagram().splitlines()]

    for name, move in MOVES.items():
        for source in move.sources:
            assert lines.count(f"{source} --> {move.target} : {name}") == 1
