"""Every error crosses the boundaries inside Celery, and says in a sentence what is wrong."""

import copy
import inspect
import pickle

import pytest

from celery_durable import errors
from celery_durable.engine.outcome import Suspend
from celery_durable.errors import Abort, DurableError, RunFailed, WaitTimeout

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]
ARGUMENTS = {"RunFailed": ("shop.Refused", "no funds")}


def make(found: type[Exception]) -> Exception:
    return found(*ARGUMENTS.get(found.__name__, ("it went wrong",)))


each_class = pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)


@each_class
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(found: type[Exception], protocol: int) -> None:
    error = make(found)

    back = pickle.loads(pickle.dumps(error, protocol))

    assert type(back) is found
    assert (back.args, vars(back), str(back)) == (error.args, vars(error), str(error))


@each_class
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_an_error_survives_copying(found: type[Exception], copied: object) -> None:
    error = make(found)

    back = copied(error)  # type: ignore[operator]

    assert type(back) is found
    assert (back.args, vars(back), str(back)) == (error.args, vars(error), str(error))


@each_class
def test_an_error_is_described(found: type[Exception]) -> None:
    assert found.__doc__


@each_class
def test_an_error_that_users_may_see_is_in_the_tree_that_the_module_draws(found: type[Exception]) -> None:
    if issubclass(found, DurableError):
        assert found.__name__ in (errors.__doc__ or "")


def test_the_code_of_an_error_is_one_that_a_failed_run_may_have() -> None:
    known = {"exception", "abort", "timeout", "crash_loop", "divergence", "payload", "unknown_task", "compensation"}

    assert {found.code for found in CLASSES if issubclass(found, DurableError)} <= known


def test_a_failed_run_is_named_with_its_class_and_text() -> None:
    assert str(RunFailed("Refused", "no funds")) == "Refused: no funds"
    assert str(RunFailed("Refused")) == "Refused"


def test_a_wait_that_ran_out_is_a_timeout_to_python_too() -> None:
    assert isinstance(WaitTimeout("late"), TimeoutError)


def test_a_suspension_is_not_caught_by_code_that_catches_errors() -> None:
    assert not issubclass(Suspend, Exception)
    assert issubclass(Abort, Exception)
