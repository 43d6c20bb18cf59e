"""Records are found by name and occurrence, whatever has moved around them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_durable.engine.journal import Journal
from celery_durable.errors import ConflictError
from celery_durable.states import StepState
from celery_durable.store.steps import Record


def record(key: str, seq: int, kind: str = "step", fingerprint: str | None = None) -> Record:
    name = key.partition("#")[0]
    return Record(key=key, seq=seq, name=name, kind=kind, state=StepState.SUCCEEDED, fingerprint=fingerprint)


def take(journal: Journal, name: str, kind: str = "step", fingerprint: str | None = None) -> str | None:
    """Come to a step as a body does, record it if it is new, and return how it differs from the record."""
    key = journal.next_key(name, "code")
    found = journal.visit(key)
    difference = journal.difference(key, found, kind, fingerprint)
    if found is None:
        journal.add(record(key, journal.next_seq(), kind, fingerprint))
    return difference


def test_the_first_occurrence_is_called_by_its_name_and_later_ones_are_numbered() -> None:
    journal = Journal([])

    assert [journal.next_key("charge", "code") for _ in range(3)] == ["charge", "charge#2", "charge#3"]
    assert journal.next_key("ship", "code") == "ship"


def test_a_name_cannot_stand_for_two_functions() -> None:
    journal = Journal([])
    journal.next_key("charge", "shop.charge")

    with pytest.raises(
        ConflictError, match=r"'charge' is used by two functions, shop.charge and bank.charge; give one"
    ):
        journal.next_key("charge", "bank.charge")


def test_new_records_come_after_all_that_are_known() -> None:
    journal = Journal([record("b", 7), record("a", 3)])

    assert [journal.next_seq(), journal.next_seq()] == [8, 9]


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_the_same_path_differs_in_nothing(names: list[str]) -> None:
    first = Journal([])
    made = [take(first, name) for name in names]
    recorded: list[Record] = []
    counts: dict[str, int] = {}
    for seq, name in enumerate(names, 1):
        counts[name] = counts.get(name, 0) + 1
        recorded.append(record(name if counts[name] == 1 else f"{name}#{counts[name]}", seq))

    again = Journal(recorded)

    assert made == [None] * len(names)
    assert [take(again, name) for name in names] == [None] * len(names)
    assert again.unvisited == []
    assert len(again) == len(names)


@given(st.permutations(["a", "b", "c", "d"]))
def test_a_step_finds_its_record_in_whatever_order_the_code_comes_to_it(order: list[str]) -> None:
    journal = Journal([record(name, seq) for seq, name in enumerate("abcd", 1)])

    found = [journal.visit(journal.next_key(name, "code")) for name in order]

    assert [one and one.name for one in found] == order


def test_a_step_that_is_new_in_the_code_is_noticed() -> None:
    journal = Journal([record("a", 1), record("b", 2)])
    take(journal, "a")

    assert take(journal, "new") == "'new' is new in the code; the record goes on with 'b' at this place"


def test_a_step_that_was_moved_is_noticed() -> None:
    journal = Journal([record("a", 1), record("b", 2)])
    take(journal, "b")

    assert take(journal, "a") == "'a' was recorded before 'b' but the code now takes it after"


def test_a_step_that_became_another_kind_is_noticed() -> None:
    journal = Journal([record("nap", 1, kind="sleep")])

    assert take(journal, "nap") == "'nap' was recorded as a sleep but the code now takes it as a step"


def test_other_arguments_are_noticed() -> None:
    journal = Journal([record("a", 1, fingerprint="00")])

    assert take(journal, "a", fingerprint="ff") == "'a' was recorded with other arguments than the code now passes"


def test_what_the_code_no_longer_takes_is_left_over() -> None:
    journal = Journal([record("a", 1), record("gone", 2), record("b", 3)])
    take(journal, "a")
    take(journal, "b")

    assert journal.unvisited == ["gone"]
