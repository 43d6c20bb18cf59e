"""The states of a run and the moves between them.

The table below is the only place where a move is allowed: the guard of every `UPDATE`, the
`CHECK` constraint and the diagram in the docs are made from it.
"""

from dataclasses import dataclass
from enum import StrEnum


class RunState(StrEnum):
    """Where a run is."""

    PENDING = "pending"  #: stored; its message is sent or about to be
    DELAYED = "delayed"  #: its start time lies ahead
    QUEUED = "queued"  #: held back by a limit or a paused queue
    RUNNING = "running"  #: a worker holds its lease
    WAITING = "waiting"  #: suspended until a time or an event
    RETRYING = "retrying"  #: suspended until the back-off after a failed attempt is over
    SUCCEEDED = "succeeded"  #: its body returned
    FAILED = "failed"  #: it ended with an error; its code says of what kind
    CANCELLED = "cancelled"  #: somebody ended it
    EXPIRED = "expired"  #: not begun in time


TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED})
SUSPENDED = frozenset({RunState.DELAYED, RunState.WAITING, RunState.RETRYING})
LIVE = frozenset(RunState) - TERMINAL


class StepState(StrEnum):
    """Where a recorded step is."""

    SUCCEEDED = "succeeded"  #: its output is stored
    FAILED = "failed"  #: its own retries are used up; a retry of the run forgets it
    RETRYING = "retrying"  #: an attempt failed, the next one has a time
    WAITING = "waiting"  #: a wait that has a time


@dataclass(frozen=True, slots=True)
class Move:
    """One allowed change of state."""

    sources: frozenset[RunState]
    target: RunState
    meaning: str


def _move(*sources: RunState, to: RunState, meaning: str) -> Move:
    return Move(frozenset(sources), to, meaning)


MOVES: dict[str, Move] = {
    # A delayed run is claimed when its time has come; see the setting `durable_eta_horizon`.
    "claim": _move(RunState.PENDING, RunState.DELAYED, to=RunState.RUNNING, meaning="a worker took the message"),
    "suspend": _move(RunState.RUNNING, to=RunState.WAITING, meaning="the body waits"),
    "back_off": _move(RunState.RUNNING, to=RunState.RETRYING, meaning="an attempt failed"),
    "release": _move(RunState.RUNNING, to=RunState.PENDING, meaning="the worker hands the run back"),
    "recover": _move(RunState.RUNNING, to=RunState.PENDING, meaning="the lease ran out"),
    "wake": _move(*SUSPENDED, to=RunState.PENDING, meaning="its time or event has come"),
    "succeed": _move(RunState.RUNNING, to=RunState.SUCCEEDED, meaning="the body returned"),
    "fail": _move(RunState.RUNNING, to=RunState.FAILED, meaning="it cannot go on"),
    "give_up": _move(RunState.PENDING, to=RunState.FAILED, meaning="its message cannot be read"),
    "expire": _move(
        RunState.PENDING, RunState.DELAYED, RunState.QUEUED, to=RunState.EXPIRED, meaning="not begun in time"
    ),
    "cancel": _move(*LIVE, to=RunState.CANCELLED, meaning="someone asked for it"),
    "retry": _move(
        RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED, to=RunState.PENDING, meaning="an operator's retry"
    ),
}


def diagram() -> str:
    """Return the moves as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> pending : start", "    [*] --> delayed : start with a delay"]
    for name, move in MOVES.items():
        lines += [f"    {source} --> {move.target} : {name}" for source in sorted(move.sources)]
    lines += [f"    {state} --> [*]" for state in sorted(TERMINAL)]
    return "\n".join(lines) + "\n"
