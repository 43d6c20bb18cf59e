"""Each wrong input is answered by one clear sentence, and nothing is stored or lost by it."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from kombu.exceptions import EncodeError
from pydantic import BaseModel

from celery_durable import (
    ConflictError,
    Durable,
    DurableTask,
    PayloadError,
    RetryPolicy,
    RunHandle,
    StoreUnavailable,
    current_run,
    now,
    patched,
    random,
    sleep,
    sleep_until,
    step,
    uuid4,
)
from celery_durable.errors import SchemaError, SettingsError, UsageError
from celery_durable.store import schema
from celery_durable.store.database import Database

Body = Callable[..., Any]


class Order(BaseModel):
    id: int


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app with an empty SQLite store; its messages stay in memory."""
    made = Celery("bad", broker="memory://", backend="cache+memory://", set_as_current=False)
    durable = Durable(made, store_url=f"sqlite:///{tmp_path / 'store.db'}", retry=RetryPolicy.none(), max_payload=1000)
    durable.migrate()
    yield made
    durable.runtime.database.close()
    made.close()


def task_of(app: Celery, body: Body, **options: Any) -> Any:
    return app.task(base=DurableTask, shared=False, name=f"bad.{body.__name__}", **options)(body)


def only_run(app: Celery) -> Any:
    [run] = app.durable.runs.list()
    return run


def fails(app: Celery, body: Body, error: type[Exception], code: str, sentence: str) -> None:
    """Run a body eagerly and check how it failed, for its caller and in the store."""
    result = task_of(app, body).apply()

    with pytest.raises(error, match=sentence) as caught:
        result.get()
    assert "\n" not in str(caught.value)
    run = only_run(app)
    assert (run.state, run.error_code) == ("failed", code)
    assert str(caught.value) in run.error


# -- settings and stores ----------------------------------------------------------------------------


def test_an_unknown_setting_of_the_app_is_refused_with_the_nearest_name() -> None:
    app = Celery("wrong", broker="memory://", set_as_current=False)
    app.conf.durable_leese = 5
    with pytest.raises(SettingsError, match=r"^unknown setting durable_leese, did you mean durable_lease\?$"):
        Durable(app).settings  # noqa: B018


def test_an_unknown_keyword_is_refused_with_the_nearest_name() -> None:
    app = Celery("wrong", broker="memory://", set_as_current=False)

    with pytest.raises(SettingsError, match=r"^unknown setting durable_sweep_intervall, did you mean durable_sweep_in"):
        Durable(app, sweep_intervall=5).settings  # noqa: B018


@pytest.mark.parametrize(
    "url", ["mysql://user:hunter2@db/shop", "postgresql+asyncpg://user:hunter2@db/shop", "shop", ""]
)
def test_a_store_of_another_kind_is_refused(url: str) -> None:
    app = Celery("wrong", broker="memory://", set_as_current=False)

    with pytest.raises(
        SettingsError, match=r"^expected durable_store_url as postgresql://… or sqlite:///…, got: "
    ) as caught:
        Durable(app, store_url=url).settings  # noqa: B018
    assert "hunter2" not in str(caught.value)


def test_a_store_that_is_out_of_reach_fails_the_start_without_showing_its_password() -> None:
    app = Celery("away", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = "nobody-else-uses-this"  # messages in memory belong to the whole process
    Durable(app, store_url="postgresql://user:hunter2@127.0.0.1:1/shop")

    def body() -> None: ...

    with pytest.raises(StoreUnavailable, match=r"^the store .*127\.0\.0\.1:1/shop does not answer: ") as caught:
        task_of(app, body).delay()

    assert "hunter2" not in str(caught.value)
    with app.connection_for_read() as connection:
        assert connection.default_channel.queue_declare("nobody-else-uses-this").message_count == 0


def test_a_store_without_tables_fails_the_start_with_the_command_that_makes_them(tmp_path: Path) -> None:
    app = Celery("fresh", broker="memory://", set_as_current=False)
    durable = Durable(app, store_url=f"sqlite:///{tmp_path / 'fresh.db'}")

    def body() -> None: ...

    with pytest.raises(SchemaError, match=r"has no tables yet; run: celery -A <app> durable migrate$"):
        task_of(app, body).delay()
    durable.runtime.database.close()


def test_tables_of_a_later_release_are_not_migrated(app: Celery) -> None:
    database: Database = app.durable.runtime.database
    newer = sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    database.once(lambda conn: conn.execute(newer))

    with pytest.raises(
        SchemaError, match=r"^the tables are of version 9999, which this release does not know; upgrade"
    ):
        app.durable.migrate()


def test_a_task_of_an_app_without_durable_is_refused_with_what_to_call() -> None:
    app = Celery("plain", broker="memory://", set_as_current=False)

    def body() -> None: ...

    with pytest.raises(
        UsageError, match=r"^task 'bad\.body' is durable but its app 'plain' is not; call Durable\(app\) f"
    ):
        task_of(app, body).delay()


# -- arguments --------------------------------------------------------------------------------------


def order(order: Order, count: int = 1) -> None: ...


def untyped(value):  # type: ignore[no-untyped-def]
    return value


@pytest.mark.parametrize(
    ("body", "args", "kwargs", "error", "sentence"),
    [
        (order, ({"id": "x"},), {}, PayloadError, r"^argument 'order' of bad\.order: id: .*, got: 'x'$"),
        (order, ({"id": 1}, "many"), {}, PayloadError, r"^argument 'count' of bad\.order: .*, got: 'many'$"),
        (order, (), {}, TypeError, r"order\(\) missing .*'order'"),
        (order, ({"id": 1}, 2, 3), {}, TypeError, r"order\(\) (takes|too many)"),
        (order, ({"id": 1},), {"size": 3}, TypeError, r"order\(\) got an unexpected keyword argument 'size'"),
        (untyped, (), {}, TypeError, r"untyped\(\) missing"),
        (untyped, (1, 2), {}, TypeError, r"untyped\(\) takes"),
        (
            untyped,
            ("x" * 1001,),
            {},
            PayloadError,
            r"^the input of bad\.untyped is 1,\d+ bytes, over durable_max_payload",
        ),
        (untyped, ("a\x00b",), {}, PayloadError, r"^the input of bad\.untyped holds a NUL character"),
        (untyped, ("\ud800",), {}, PayloadError, r"^the input of bad\.untyped holds half of a surrogate pair"),
        (untyped, (object(),), {}, EncodeError, "^Object of type object is not JSON serializable$"),
    ],
)
def test_a_start_with_wrong_arguments_fails_at_the_caller_and_stores_nothing(
    app: Celery, body: Body, args: Any, kwargs: Any, error: Any, sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        task_of(app, body).apply_async(args, kwargs)

    assert app.durable.runs.list() == []


def test_a_handle_of_an_unknown_run_says_so(app: Celery) -> None:
    with pytest.raises(UsageError, match=r"^no run has the id 'nobody'; "):
        app.durable.runs.get("nobody")


def test_a_handle_without_an_app_says_where_to_take_it_from() -> None:
    with pytest.raises(
        UsageError, match=r"^the handle of run 'x' has no app; take it from the task or from app\.durable"
    ):
        RunHandle("x", app=Celery(set_as_current=False)).run  # noqa: B018


def test_a_state_that_does_not_exist_is_refused_with_those_that_do(app: Celery) -> None:
    with pytest.raises(UsageError, match=r"^expected one of pending, .*expired, got: 'lost'$"):
        app.durable.runs.list(state="lost")


# -- what steps return ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (object(), r"^the output of step 'make' holds a object, which is not JSON; annotate the return type"),
        ("a\x00b", r"^the output of step 'make' holds a NUL character, which PostgreSQL cannot store"),
        ("\ud800", r"^the output of step 'make' holds half of a surrogate pair"),
        ("x" * 999, r"^the output of step 'make' is 1,001 bytes, over durable_max_payload \(1,000\)"),
        (float("nan"), r"^the output of step 'make' cannot be stored as JSON"),
    ],
)
def test_an_output_that_cannot_be_stored_fails_the_run(app: Celery, value: Any, sentence: str) -> None:
    taken: list[int] = []

    def make():  # type: ignore[no-untyped-def]
        taken.append(1)
        return value

    def body() -> None:
        step(make, retry=RetryPolicy(max_attempts=5))()

    fails(app, body, PayloadError, "payload", sentence)
    assert taken == [1], "the same output would be refused again"
    [record] = app.durable.runs.steps(only_run(app).id)
    assert (record.key, record.state, record.output) == ("make", "failed", None)


def test_a_result_that_cannot_be_stored_fails_the_run(app: Celery) -> None:
    def body():  # type: ignore[no-untyped-def]
        return object()

    fails(app, body, PayloadError, "payload", r"^the result of task 'bad\.body' holds a object")


def test_a_body_may_catch_what_a_step_could_not_store(app: Celery) -> None:
    def body() -> str:
        try:
            step(object, name="make")()
        except PayloadError:
            return "caught"
        return "stored"

    assert task_of(app, body).apply().get() == "caught"


# -- steps ------------------------------------------------------------------------------------------


def test_a_name_that_two_steps_share_fails_the_run(app: Celery) -> None:
    def first() -> int:
        return 1

    def second() -> int:
        return 2

    def body() -> None:
        step(first, name="same")()
        step(second, name="same")()

    fails(
        app, body, ConflictError, "exception", r"^the step name 'same' is used by two functions, .*first and .*second; "
    )


def test_a_coroutine_function_is_refused_where_it_is_made_a_step() -> None:
    async def later() -> None: ...

    with pytest.raises(UsageError, match=r"^step expects a plain function, got: the coroutine function '.*later'$"):
        step(later)


def test_a_coroutine_function_is_refused_where_it_is_made_a_task(app: Celery) -> None:
    async def body() -> None: ...

    with pytest.raises(UsageError, match=r"^a durable task expects a plain function, got: the coroutine function "):
        task_of(app, body).name  # noqa: B018


@pytest.mark.parametrize("function", [lambda: 1, type("Callable", (), {"__call__": lambda self: 1})()])
def test_a_step_that_has_no_name_is_refused_where_it_is_made(function: Any) -> None:
    with pytest.raises(
        UsageError, match=r"^a step of a lambda or a callable object needs a name; write step\(…, name="
    ):
        step(function)


@pytest.mark.parametrize("function", [lambda: 1, type("Callable", (), {"__call__": lambda self: 1})()])
def test_a_lambda_or_an_object_with_a_name_is_a_step(app: Celery, function: Any) -> None:
    def body() -> int:
        value: int = step(function, name="one")()
        return value

    assert task_of(app, body).apply().get() == 1


@pytest.mark.parametrize("wrong", [5, "charge"])
def test_what_cannot_be_called_is_refused_where_it_is_made_a_step(wrong: Any) -> None:
    with pytest.raises(UsageError, match="step"):
        step(wrong)


# -- waits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sleep(1), "sleep"),
        (lambda: sleep_until(datetime.max), "sleep_until"),
        (now, "now"),
        (uuid4, "uuid4"),
        (random, "random"),
        (lambda: patched("x"), "patched"),
        (current_run, "current_run"),
    ],
)
def test_what_needs_a_run_says_so_outside_a_durable_task(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} was called outside a durable task; call it from the body of a @dur"):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [(lambda: sleep(1), "sleep"), (lambda: str(uuid4()), "uuid4"), (lambda: patched("x"), "patched:x")],
)
def test_what_would_be_recorded_inside_a_step_is_refused_there(app: Celery, call: Callable[[], Any], name: str) -> None:
    def body() -> None:
        step(call, name="inner")()

    fails(
        app, body, UsageError, "exception", f"^{name} was called inside step 'inner'; only the body of a durable task"
    )


@pytest.mark.parametrize(
    "duration", [-1, -0.001, timedelta(seconds=-1), "soon", None, float("nan"), float("inf"), 10**30]
)
def test_a_sleep_that_makes_no_sense_is_refused(app: Celery, duration: Any) -> None:
    def body() -> None:
        sleep(duration)

    fails(app, body, UsageError, "exception", r"^sleep expects (0 seconds or more|seconds or a timedelta), got: ")
    assert app.durable.runs.steps(only_run(app).id) == []


@pytest.mark.parametrize("at", [datetime(2030, 1, 1), "2030-01-01", 5, None])
def test_a_naive_datetime_is_refused(app: Celery, at: Any) -> None:
    def body() -> None:
        sleep_until(at)

    fails(app, body, UsageError, "exception", r"^sleep_until expects an aware datetime, got: .*; give it a tzinfo")
    assert app.durable.runs.steps(only_run(app).id) == []


def test_a_key_for_a_step_has_no_meaning_outside_of_one(app: Celery) -> None:
    def body() -> None:
        current_run().idempotency_key()

    fails(
        app, body, UsageError, "exception", r"^idempotency_key\(scope='step'\) has a meaning inside a step only; use "
    )


def test_a_policy_that_makes_no_sense_is_refused_where_it_is_made() -> None:
    with pytest.raises(UsageError, match=r"^expected max_attempts from 1 to 250, got: 0$"):
        RetryPolicy(max_attempts=0)


def test_a_divergence_rule_that_does_not_exist_is_refused_where_the_task_is_made(app: Celery) -> None:
    def body() -> None: ...

    with pytest.raises(UsageError, match="on_divergence"):
        task_of(app, body, on_divergence="explode").name  # noqa: B018


def test_a_retry_policy_of_another_type_is_refused_where_the_step_is_made() -> None:
    with pytest.raises(UsageError, match="RetryPolicy"):
        step(print, retry=3)  # type: ignore[call-overload]
