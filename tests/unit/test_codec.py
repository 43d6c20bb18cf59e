"""What is stored comes back as the type that was declared, or is refused with the reason."""

import inspect
import json
import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, NewType, Optional
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from celery_durable import RunFailed
from celery_durable.codec import Codec, Signature, dump_error, fingerprint, load_error
from celery_durable.errors import DivergenceError, PayloadError

MAX = 1024 * 1024
UNTYPED = Codec("the output of step 'charge'", inspect.Parameter.empty)


class Item(BaseModel):
    name: str
    price: Decimal


class Order(BaseModel):
    id: int
    items: list[Item]
    note: str | None = None


@dataclass(frozen=True)
class Point:
    x: int
    y: float


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


OrderId = NewType("OrderId", int)
ORDER = Order(id=7, items=[Item(name="tea", price=Decimal("3.50"))])

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"])), inner),
    max_leaves=20,
)


@given(json_values)
def test_any_json_value_comes_back_equal(value: Any) -> None:
    assert UNTYPED.load(UNTYPED.dump(value, MAX)) == value


@given(json_values)
def test_any_json_value_is_stored_as_json_text_that_any_database_holds(value: Any) -> None:
    text = UNTYPED.dump(value, MAX)

    assert json.loads(text) == value
    assert "\0" not in text
    text.encode()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Order, ORDER),
        (list[Order], [ORDER, ORDER]),
        (dict[str, Order], {"first": ORDER}),
        (Point, Point(1, 2.5)),
        (tuple[int, Point], (1, Point(1, 2.5))),
        (datetime, datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC)),
        (date, date(2024, 2, 29)),
        (timedelta, timedelta(days=1, microseconds=5)),
        (UUID, UUID("6f1d1d0e-8f0b-4d6c-9a57-0c1f3a2b7e55")),
        (Decimal, Decimal("1.10")),
        (Colour, Colour.BLUE),
        (OrderId, OrderId(12)),
        (Optional[Order], None),  # noqa: UP045
        (Order | None, ORDER),
        (set[int], {1, 2, 3}),
        (Path, Path("/srv/orders")),
        (bytes, b"plain bytes"),
        (int, 2**70),
        (None, None),
        (list[Any], [1, "two", {"three": 3}]),
    ],
)
def test_a_value_comes_back_as_the_type_that_was_declared(annotation: Any, value: Any) -> None:
    codec = Codec("the output of step 'charge'", annotation)

    back = codec.load(codec.dump(value, MAX))

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_float_that_json_does_not_know_does_not_come_back_as_none(value: float) -> None:
    codec = Codec("the output of step 'charge'", float)

    try:
        back = codec.load(codec.dump(value, MAX))
    except PayloadError:
        return
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_bytes_that_are_no_text_are_refused_or_kept() -> None:
    codec = Codec("the output of step 'charge'", bytes)

    try:
        assert codec.load(codec.dump(b"\xff\x00\xfe", MAX)) == b"\xff\x00\xfe"
    except PayloadError as error:
        assert "the output of step 'charge'" in str(error)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (ORDER, "holds a Order, which is not JSON; annotate the return type to have it stored"),
        (datetime(2024, 1, 1, tzinfo=UTC), "holds a datetime, which is not JSON"),
        ({1, 2}, "holds a set, which is not JSON"),
        (b"x", "holds a bytes, which is not JSON"),
        ([{"deep": [object()]}], "holds a object, which is not JSON"),
        ({1: "one"}, "has the key 1; JSON has text keys only, annotate its type to keep it"),
        (float("nan"), "cannot be stored as JSON"),
        (float("inf"), "cannot be stored as JSON"),
    ],
)
def test_what_would_come_back_different_is_refused_unless_it_is_annotated(value: Any, sentence: str) -> None:
    with pytest.raises(PayloadError) as caught:
        UNTYPED.dump(value, MAX)

    assert str(caught.value).startswith("the output of step 'charge' ")
    assert sentence in str(caught.value)


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(PayloadError, match="cannot be stored as JSON"):
        UNTYPED.dump(endless, MAX)


each_codec = pytest.mark.parametrize("codec", [UNTYPED, Codec("the output of step 'charge'", str)])


@each_codec
def test_a_nul_is_refused_with_what_to_do(codec: Codec) -> None:
    with pytest.raises(PayloadError, match="holds a NUL character, which PostgreSQL cannot store; strip it or encode"):
        codec.dump("a\x00b", MAX)


@each_codec
@pytest.mark.parametrize("text", ["\\u0000", "\\\\u0000", "a \\ u0000", "\\n\x01"])
def test_a_text_that_only_looks_like_a_nul_is_kept(codec: Codec, text: str) -> None:
    assert codec.load(codec.dump(text, MAX)) == text


def test_a_nul_behind_a_backslash_is_refused() -> None:
    with pytest.raises(PayloadError, match="NUL"):
        UNTYPED.dump("\\\x00", MAX)


@each_codec
def test_half_of_a_surrogate_pair_is_refused(codec: Codec) -> None:
    with pytest.raises(PayloadError, match=r"^the output of step 'charge' "):
        codec.dump("\ud800", MAX)


@each_codec
def test_the_size_is_counted_in_bytes(codec: Codec) -> None:
    assert codec.dump("é" * 49, 100) == f'"{"é" * 49}"'
    with pytest.raises(PayloadError) as caught:
        codec.dump("é" * 50, 100)

    assert str(caught.value) == (
        "the output of step 'charge' is 102 bytes, over durable_max_payload (100); store its address instead"
    )


def test_a_value_that_does_not_fit_its_annotation_is_refused_with_the_place() -> None:
    with pytest.raises(PayloadError, match=r"does not fit its annotation: items\.0\.price: .*got: 'free'"):
        Codec("the output of step 'charge'", Order).dump({"id": 1, "items": [{"name": "x", "price": "free"}]}, MAX)


def test_a_value_that_was_stored_in_another_shape_is_refused_when_it_is_read() -> None:
    with pytest.raises(PayloadError, match="was stored in another shape: id: "):
        Codec("the output of step 'charge'", Order).load('{"id": "x", "items": []}')


def test_an_annotation_that_pydantic_cannot_carry_is_refused_with_what_to_use() -> None:
    class Opaque:
        pass

    with pytest.raises(PayloadError, match="which pydantic cannot carry; use a model, a dataclass or JSON types"):
        Codec("the output of step 'charge'", Opaque)


# -- arguments --------------------------------------------------------------------------------------


def order_task(order: Order, count: int = 1, *labels: str, when: datetime | None = None, free: Any = None) -> Point:
    return Point(count, 0.0)


def test_arguments_become_json_and_come_back_as_their_types() -> None:
    signature = Signature(order_task, "shop.order")
    when = datetime(2024, 1, 1, tzinfo=UTC)

    sent = signature.dump((ORDER, 2, "a", "b"), {"when": when, "free": {"x": 1}})

    assert json.loads(json.dumps(sent)) == [list(sent[0]), sent[1]]
    assert signature.load(*sent) == ((ORDER, 2, "a", "b"), {"when": when, "free": {"x": 1}})


def test_an_argument_of_the_wrong_type_is_named() -> None:
    with pytest.raises(PayloadError, match=r"^argument 'count' of shop\.order: .* got: 'many'$"):
        Signature(order_task, "shop.order").dump((ORDER, "many"), {})


@pytest.mark.parametrize("args", [(), (ORDER, 1)])
def test_a_call_that_does_not_fit_the_parameters_names_the_task(args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"^shop\.order\(\) "):
        Signature(order_task, "shop.order").dump(args, {"unknown": 1})


# -- errors -----------------------------------------------------------------------------------------


class Refused(Exception):
    """An error whose constructor takes something else than its arguments."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"refused with {code}: {reason}")
        self.code = code
        self.reason = reason


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [KeyError("gone"), ValueError("a", 1), Refused(402, reason="no funds"), RunFailed("KeyError", "x")],
)
def test_an_error_comes_back_as_its_own_class_with_what_it_carried(error: Exception) -> None:
    back = load_error(dump_error(raised(error)))

    assert type(back) is type(error)
    assert back.args == error.args
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_stored_error_holds_the_traceback() -> None:
    assert "def raised" not in dump_error(KeyError("x"))
    assert "in raised" in json.loads(dump_error(raised(KeyError("x"))))["traceback"]


def test_an_error_whose_class_is_not_loaded_is_not_imported() -> None:
    text = json.dumps({"type": "antigravity:Fall", "message": "down", "args": ["down"], "attributes": None})

    back = load_error(text)

    assert isinstance(back, RunFailed)
    assert str(back) == "Fall: down"


@pytest.mark.parametrize("name", ["os:system", "builtins:SystemExit", "builtins:print", "builtins:no.such"])
def test_only_exceptions_are_made_of_what_is_stored(name: str) -> None:
    assert isinstance(load_error(json.dumps({"type": name, "message": "", "args": ["x"], "attributes": {}})), RunFailed)


def test_an_error_with_arguments_that_are_not_json_keeps_its_text() -> None:
    back = load_error(dump_error(raised(KeyError(object))))

    assert isinstance(back, RunFailed)
    assert "object" in str(back)


def test_an_error_of_validation_keeps_its_text() -> None:
    with pytest.raises(ValidationError) as caught:
        Order(id="x", items=[])  # type: ignore[arg-type]

    assert "validation error for Order" in str(load_error(dump_error(caught.value)))


@pytest.mark.parametrize("text", ["a\x00b", "\ud800", "x" * 200_000])
def test_any_error_can_be_stored(text: str) -> None:
    stored = dump_error(raised(ValueError(text)))

    stored.encode()
    assert "\\u0000" not in stored
    assert isinstance(load_error(stored), Exception)


def test_a_unicode_error_comes_back() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()

    assert "codec can't decode" in str(load_error(dump_error(caught.value)))


def test_an_error_that_cannot_describe_itself_is_stored_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert "Mute" in dump_error(raised(Mute()))


def test_attributes_that_are_not_json_do_not_hide_those_that_are() -> None:
    error = DivergenceError("x")
    error.at, error.lock = 3, object()  # type: ignore[attr-defined]

    assert vars(load_error(dump_error(raised(error)))).get("at") == 3


# -- fingerprints -----------------------------------------------------------------------------------


def test_a_fingerprint_is_equal_for_equal_values_only() -> None:
    assert fingerprint((1, ORDER), {"a": 1}) == fingerprint((1, ORDER.model_copy()), {"a": 1})
    assert len({fingerprint(value) for value in (1, "1", 1.5, None, [1], {"a": 1}, {"a": 2}, ORDER)}) == 8


def test_a_fingerprint_can_be_taken_of_anything() -> None:
    assert fingerprint((object(), float("nan"), {1, 2}, b"\xff", "\ud800", lambda: None), {})
