"""Turns values into the JSON text that is stored, and back.

What a body sees of a value is always what the store gives back, also the first time: a value that
would come back different in kind is refused, and the message says which annotation would carry it.
"""

import hashlib
import inspect
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pydantic_core
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

from celery_durable.errors import PayloadError, RunFailed

_PLAIN = (str, int, float, bool, type(None))
_TRACEBACK_LIMIT = 16_000
_HALF = "{} holds half of a surrogate pair, which is no text; replace it"
#: An escaped half of a surrogate pair without its other half.
_HALF_PAIR = re.compile(
    r"\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f][0-9a-f]{2})|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2}", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Codec:
    """Stores values of one declared type; without a type, plain JSON values only.

    Args:
        label: what the value is, for messages: "the output of step 'charge'".
        annotation: the declared type, or `inspect.Parameter.empty`.
    """

    label: str
    annotation: Any
    _adapter: TypeAdapter[Any] | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_adapter", _adapter_of(self.annotation, self.label))

    def dump(self, value: Any, max_bytes: int) -> str:
        """Return `value` as JSON text of at most `max_bytes`.

        Raises:
            PayloadError: when it does not fit its type, is no JSON, holds NUL or is too large.
        """
        try:
            if self._adapter is None:
                _refuse_untyped(value, self.label)
                text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            else:
                text = self._adapter.dump_json(self._adapter.validate_python(value)).decode()
        except pydantic_core.ValidationError as error:
            raise PayloadError(f"{self.label} does not fit its annotation: {_first(error)}") from None
        except (pydantic_core.PydanticSerializationError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, PayloadError):
                raise
            raise PayloadError(f"{self.label} cannot be stored as JSON: {error}") from None
        return checked(text, self.label, max_bytes)

    def load(self, text: str) -> Any:
        """Return the value that `dump` stored as `text`."""
        try:
            return json.loads(text) if self._adapter is None else self._adapter.validate_json(text)
        except pydantic_core.ValidationError as error:
            raise PayloadError(f"{self.label} was stored in another shape: {_first(error)}") from None

    def from_json(self, value: Any) -> Any:
        """Return a JSON value, as a result backend keeps it, as the declared type.

        Raises:
            PayloadError: when it is a value of another shape.
        """
        try:
            return value if self._adapter is None else self._adapter.validate_python(value)
        except pydantic_core.ValidationError as error:
            raise PayloadError(f"{self.label} has another shape: {_first(error)}") from None


def checked(text: str, label: str, max_bytes: int) -> str:
    """Return `text` if the store can hold it.

    Raises:
        PayloadError: for NUL, lone surrogates and more than `max_bytes`.
    """
    if "\\u0000" in text and "\\u0000" in text.replace("\\\\", ""):
        raise PayloadError(f"{label} holds a NUL character, which PostgreSQL cannot store; strip it or encode it")
    if "\\ud" in text.lower() and _HALF_PAIR.search(text.replace("\\\\", "")):
        raise PayloadError(_HALF.format(label))
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise PayloadError(_HALF.format(label)) from None
    if size > max_bytes:
        raise PayloadError(
            f"{label} is {size:,} bytes, over durable_max_payload ({max_bytes:,}); store its address instead"
        )
    return text


class Signature:
    """The declared parameters of a durable task: its arguments are checked and made JSON, and read back.

    `self` of a bound method is not among them. Parameters without an annotation pass untouched.
    """

    def __init__(self, function: Callable[..., Any], task: str) -> None:
        self.task = task
        self._function = function

    @cached_property
    def _parameters(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return hints_of(self._function)

    @cached_property
    def _adapters(self) -> dict[str, TypeAdapter[Any]]:
        found = {}
        for name in self._parameters.parameters:
            adapter = _adapter_of(self._hints.get(name, inspect.Parameter.empty), f"argument {name!r} of {self.task}")
            if adapter is not None:
                found[name] = adapter
        return found

    @cached_property
    def result(self) -> Codec:
        """The codec of what the task returns."""
        annotation = self._hints.get("return", inspect.Parameter.empty)
        return Codec(f"the result of task {self.task!r}", annotation)

    def dump(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the arguments of a call and return them as JSON values.

        Raises:
            PayloadError: when one does not fit its annotation.
            TypeError: when there are too many or too few.
        """
        return self._each(args, kwargs, _dumped)

    def load(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a message as the types that the task declares."""
        return self._each(args, kwargs, _loaded)

    def _each(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], convert: Callable[[TypeAdapter[Any], Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._adapters:
            return tuple(args), dict(kwargs)
        try:
            bound = self._parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.task}() {error}") from None
        for name, adapter in self._adapters.items():
            if name not in bound.arguments:
                continue
            kind, value = self._parameters.parameters[name].kind, bound.arguments[name]
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(self._one(name, adapter, item, convert) for item in value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._one(key, adapter, item, convert) for key, item in value.items()}
            else:
                bound.arguments[name] = self._one(name, adapter, value, convert)
        return bound.args, bound.kwargs

    def _one(
        self, name: str, adapter: TypeAdapter[Any], value: Any, convert: Callable[[TypeAdapter[Any], Any], Any]
    ) -> Any:
        try:
            return convert(adapter, value)
        except pydantic_core.ValidationError as error:
            raise PayloadError(f"argument {name!r} of {self.task}: {_first(error)}") from None
        except pydantic_core.PydanticSerializationError as error:
            raise PayloadError(f"argument {name!r} of {self.task} cannot be sent as JSON: {error}") from None


def _dumped(adapter: TypeAdapter[Any], value: Any) -> Any:
    return adapter.dump_python(adapter.validate_python(value), mode="json")


def _loaded(adapter: TypeAdapter[Any], value: Any) -> Any:
    return adapter.validate_python(value)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of `function`, none where they cannot be resolved."""
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def fingerprint(*values: Any) -> str:
    """Return 16 hex digits that are equal for equal values, whatever their types can say of themselves."""
    try:
        text = pydantic_core.to_json(
            values, fallback=lambda value: type(value).__qualname__, inf_nan_mode="strings", bytes_mode="hex"
        )
    except (pydantic_core.PydanticSerializationError, ValueError):  # half a surrogate pair, a cycle
        text = ",".join(type(value).__qualname__ for value in values).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def dump_error(error: BaseException) -> str:
    """Return an error as JSON text: its class, arguments, attributes and traceback."""
    return json.dumps(
        {
            "type": f"{type(error).__module__}:{type(error).__qualname__}",
            "message": _printable(text_of(error)),
            "args": _json_or_none(list(error.args)),
            "attributes": {
                name: kept
                for name, value in vars(error).items()
                if not name.startswith("__") and ((kept := _json_or_none(value)) is not None or value is None)
            },
            "traceback": _printable("".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:]),
        }
    )


def load_error(text: str) -> BaseException:
    """Return the error that `dump_error` stored.

    It has its own class where that is loaded already and its arguments were JSON, else it is a
    `RunFailed` that names the class. Nothing is imported: a store must not choose what code runs.
    """
    stored = json.loads(text)
    module, _, name = stored["type"].partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Exception)) or stored["args"] is None:
        return RunFailed(name, stored["message"])
    try:
        error = found.__new__(found, *stored["args"])
        error.args = tuple(stored["args"])
        error.__dict__.update(stored["attributes"])
    except Exception:  # a class may ask of its construction whatever it likes
        return RunFailed(name, stored["message"])
    return error


def text_of(error: BaseException) -> str:
    """Return what an error says of itself, nothing where it cannot."""
    try:
        return str(error)
    except Exception:
        return ""


def _adapter_of(annotation: Any, label: str) -> TypeAdapter[Any] | None:
    if annotation is inspect.Parameter.empty or annotation is Any:
        return None
    try:
        return TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError):
        raise PayloadError(
            f"{label} is annotated {annotation!r}, which pydantic cannot carry; use a model, a dataclass or JSON types"
        ) from None


def _refuse_untyped(value: Any, label: str) -> None:
    """Refuse what JSON would give back as something else, unless an annotation names it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PayloadError(
                    f"{label} has the key {key!r}; JSON has text keys only, annotate its type to keep it"
                )
            _refuse_untyped(item, label)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_untyped(item, label)
    elif not isinstance(value, _PLAIN):
        raise PayloadError(
            f"{label} holds a {type(value).__qualname__}, which is not JSON; annotate the return type to have it stored"
        )


def _first(error: pydantic_core.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg']}, got: {first['input']!r:.80}"


def _json_or_none(value: Any) -> Any:
    try:
        return json.loads(checked(json.dumps(value, allow_nan=False), "error", 64 * 1024))
    except (TypeError, ValueError, RecursionError):
        return None


def _printable(text: str) -> str:
    return text.replace("\x00", "\\0").encode("utf-8", "backslashreplace").decode()
