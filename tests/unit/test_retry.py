"""A policy says when the next attempt is, and gives up in time."""

from datetime import timedelta
from typing import Any

import pytest
from celery.utils.time import get_exponential_backoff_interval
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from celery_durable import Abort, PayloadError, RetryPolicy, RunFailed, StoreUnavailable, WaitTimeout
from celery_durable.errors import UsageError

ERROR = KeyError("gone")


def delays(policy: RetryPolicy, error: BaseException = ERROR) -> list[float | None]:
    """Return the delay after each attempt, up to the one after which nobody tries again."""
    found: list[float | None] = []
    while not found or found[-1] is not None:
        delay = policy.next_delay(len(found) + 1, error)
        found.append(None if delay is None else delay.total_seconds())
    return found


def test_the_delay_doubles_up_to_the_longest() -> None:
    policy = RetryPolicy(max_attempts=7, min_delay=1, max_delay=10, jitter=False)

    assert delays(policy) == [1, 2, 4, 8, 10, 10, None]


def test_the_delay_grows_by_the_factor() -> None:
    assert delays(RetryPolicy(max_attempts=4, factor=3, min_delay=0.5, jitter=False)) == [0.5, 1.5, 4.5, None]


def test_a_fixed_delay_stays() -> None:
    assert delays(RetryPolicy.fixed(5, max_attempts=4)) == [5, 5, 5, None]


def test_a_linear_delay_grows_by_the_same_every_time() -> None:
    assert delays(RetryPolicy.linear(5, max_attempts=5, max_delay=12)) == [5, 10, 12, 12, None]


def test_an_exponential_policy_may_begin_above_the_usual_longest_delay() -> None:
    assert RetryPolicy.exponential(90, jitter=False).next_delay(1, ERROR) == timedelta(seconds=90)


@given(st.integers(1, 250), st.floats(0, 1000), st.floats(1, 10))
def test_jitter_draws_from_the_upper_half(attempt: int, first: float, factor: float) -> None:
    common: dict[str, Any] = {"max_attempts": 250, "factor": factor, "min_delay": first, "max_delay": 1000}
    plain = RetryPolicy(jitter=False, **common).next_delay(attempt, ERROR)
    drawn = RetryPolicy(**common).next_delay(attempt, ERROR)

    if plain is None or drawn is None:
        assert attempt == 250
    else:
        assert plain / 2 - timedelta(microseconds=1) <= drawn <= plain + timedelta(microseconds=1)


@pytest.mark.parametrize(
    "policy", [RetryPolicy.none(), RetryPolicy.fixed(5), RetryPolicy(), RetryPolicy(delay=lambda attempt, error: 1)]
)
def test_nobody_waits_after_the_last_attempt(policy: RetryPolicy) -> None:
    assert policy.next_delay(policy.max_attempts, ERROR) is None
    assert policy.next_delay(policy.max_attempts + 1, ERROR) is None


def test_the_highest_attempt_overflows_nothing() -> None:
    policy = RetryPolicy(max_attempts=250, factor=1e300, jitter=False)

    assert policy.next_delay(249, ERROR) == timedelta(seconds=60)


def test_only_the_named_errors_are_tried_again() -> None:
    policy = RetryPolicy(retry_on=(LookupError,), give_up_on=(KeyError,))

    assert policy.next_delay(1, IndexError()) is not None
    assert policy.next_delay(1, KeyError()) is None
    assert policy.next_delay(1, ValueError()) is None


@pytest.mark.parametrize("error", [Abort("stop"), PayloadError("too large"), UsageError("no")])
def test_an_error_that_would_come_again_is_never_tried_again(error: Exception) -> None:
    assert RetryPolicy(max_attempts=250).next_delay(1, error) is None


@pytest.mark.parametrize("error", [WaitTimeout("late"), StoreUnavailable("away"), RunFailed("KeyError")])
def test_an_error_of_circumstances_is_tried_again(error: Exception) -> None:
    assert RetryPolicy().next_delay(1, error) is not None


def test_input_that_does_not_validate_is_never_tried_again() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("many")

    assert RetryPolicy(max_attempts=250).next_delay(1, caught.value) is None


def test_a_function_may_choose_the_delay_or_give_up() -> None:
    def chosen(attempt: int, error: BaseException) -> float | timedelta | None:
        return {1: 0.25, 2: timedelta(minutes=1)}.get(attempt)

    assert delays(RetryPolicy(max_attempts=9, delay=chosen)) == [0.25, 60, None]


def test_a_function_that_chooses_a_negative_delay_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a delay of at least 0 seconds, got: -1"):
        RetryPolicy(delay=lambda attempt, error: -1).next_delay(1, ERROR)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_attempts": 0}, "expected max_attempts from 1 to 250, got: 0"),
        ({"max_attempts": 251}, "expected max_attempts from 1 to 250, got: 251"),
        ({"factor": 0.5}, "expected a factor of at least 1, got: 0.5"),
        ({"min_delay": -1}, "expected 0 <= min_delay <= max_delay, got: min_delay=-1"),
        ({"min_delay": 9, "max_delay": 3}, "expected 0 <= min_delay <= max_delay, got: min_delay=9, max_delay=3"),
        ({"max_delay": float("nan")}, "expected 0 <= min_delay <= max_delay"),
        ({"factor": float("nan")}, "expected a factor of at least 1"),
        ({"max_delay": float("inf")}, "expected 0 <= min_delay <= max_delay"),
        ({"retry_on": ValueError}, "retry_on"),
        ({"max_attempts": "3"}, "expected max_attempts from 1 to 250, got: '3'"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        RetryPolicy(**options)


# -- Celery's options -------------------------------------------------------------------------------


@pytest.mark.parametrize("backoff", [True, 1, 2.7, 3, 30])
def test_celery_s_back_off_gives_celery_s_own_numbers(backoff: Any) -> None:
    options = {"autoretry_for": (KeyError,), "retry_backoff": backoff, "retry_jitter": False, "max_retries": 11}
    celery_s = [
        float(get_exponential_backoff_interval(int(max(1.0, backoff)), retries, 600, False)) for retries in range(11)
    ]

    assert delays(RetryPolicy.from_celery(options)) == [*celery_s, None]


def test_celery_s_back_off_ends_at_ten_minutes() -> None:
    options = {"autoretry_for": (KeyError,), "retry_backoff": True, "retry_jitter": False, "max_retries": 12}

    expected = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, None]
    assert delays(RetryPolicy.from_celery(options)) == expected


def test_without_autoretry_celery_tries_once() -> None:
    assert RetryPolicy.from_celery({"max_retries": 5}) == RetryPolicy.none()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [180, 180, 180, None]),
        ({"max_retries": 1}, [180, None]),
        ({"max_retries": 0}, [None]),
        ({"default_retry_delay": 7}, [7, 7, 7, None]),
        ({"retry_kwargs": {"countdown": 4, "max_retries": 2}, "max_retries": 9}, [4, 4, None]),
    ],
)
def test_celery_s_fixed_delay_is_kept(options: dict[str, Any], expected: list[float | None]) -> None:
    assert delays(RetryPolicy.from_celery({"autoretry_for": (KeyError,), **options})) == expected


@pytest.mark.parametrize("retries", [None, 1000])
def test_no_policy_goes_beyond_250_attempts(retries: int | None) -> None:
    policy = RetryPolicy.from_celery({"autoretry_for": (KeyError,), "max_retries": retries})

    assert policy.max_attempts == 250


def test_the_errors_that_celery_gives_up_on_are_kept() -> None:
    policy = RetryPolicy.from_celery({"autoretry_for": (LookupError,), "dont_autoretry_for": (KeyError,)})

    assert policy.next_delay(1, IndexError()) is not None
    assert policy.next_delay(1, KeyError()) is None


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy.fixed(5, max_attempts=4, retry_on=(KeyError,), give_up_on=(IndexError,)),
        RetryPolicy.fixed(0, max_attempts=1),
        RetryPolicy(max_attempts=9, min_delay=2, max_delay=100, jitter=False),
        RetryPolicy(max_attempts=9, min_delay=2, max_delay=100),
    ],
)
def test_a_policy_that_celery_can_express_survives_the_way_there_and_back(policy: RetryPolicy) -> None:
    assert RetryPolicy.from_celery(policy.celery_options()) == policy


@pytest.mark.parametrize(
    "policy", [RetryPolicy(factor=3), RetryPolicy.linear(5), RetryPolicy(delay=lambda attempt, error: 1)]
)
def test_a_policy_that_celery_cannot_express_is_refused(policy: RetryPolicy) -> None:
    with pytest.raises(UsageError, match="Celery's options can express fixed delays and doubling ones only"):
        policy.celery_options()
