"""All that a Celery message carries, as text that can be published again.

The envelope of a run never changes but by Celery's own `retry` with new arguments: callbacks, chain,
chord, group, stamps, priority, routing and limits survive every suspension because nobody touches them.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from kombu import serialization
from kombu.utils import json

#: The header that marks the message of a stored run.
MARK = "durable"
#: Headers that belong to one publishing: repeated, they would delay, revoke or garble the next one.
_ONCE = frozenset({"eta", "expires", "compression", "redelivered"})
#: Headers that brokers add; they hold values that are no JSON.
_FROM_BROKER = ("x-death", "x-first-death", "x-last-death", "x-delivery-count")
_KEPT_PROPERTIES = (
    "reply_to",
    "correlation_id",
    "priority",
    "delivery_mode",
    "user_id",
    "app_id",
    "type",
    "message_id",
)
_BODY_PARTS = ("callbacks", "errbacks", "chain", "chord")


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One task message.

    `body` is the serialised body, in base64 when `is_binary`; `queue` is the queue to declare on
    publishing, by its name.
    """

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: str
    is_binary: bool
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    queue: str | None
    compression: str | None

    @classmethod
    def of_publish(cls, body: Any, options: Mapping[str, Any]) -> Self:
        """Build the envelope of a message that Celery hands to `Producer.publish`."""
        content_type, encoding, text = serialization.dumps(body, serializer=options.get("serializer"))
        declared = options.get("declare") or []
        return cls(
            headers=dict(options.get("headers") or {}),
            properties=_kept({"priority": 0, **options}),  # kombu sends 0 where Celery names none
            **_packed(text),
            content_type=content_type,
            content_encoding=encoding,
            exchange=_name(options.get("exchange")),
            routing_key=options.get("routing_key") or "",
            queue=declared[0].name if declared else None,
            compression=options.get("compression"),
        )

    @classmethod
    def of_request(cls, captured: Mapping[str, Any], request: Any) -> Self:
        """Build the envelope of a message that a worker has received, from what its main process captured."""
        parts = {name: getattr(request, name) for name in _BODY_PARTS}
        serializer = serialization.registry.type_to_name.get(captured["content_type"], "json")
        _, _, text = serialization.dumps((request.args, request.kwargs, parts), serializer=serializer)
        return cls(**_packed(text), **captured)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` wrote."""
        return cls(**json.loads(text))

    def to_text(self) -> str:
        """Return the envelope as JSON."""
        # Not asdict(): its deep copies cost several times what writing the JSON does.
        text: str = json.dumps({field.name: getattr(self, field.name) for field in fields(self)})
        return text

    def decoded(self) -> tuple[Any, Any, dict[str, Any]]:
        """Return the arguments, the keyword arguments and the rest of the body."""
        loaded: tuple[Any, Any, dict[str, Any]] = serialization.loads(
            self.payload(), self.content_type, self.content_encoding, accept=[self.content_type]
        )
        return loaded

    def payload(self) -> str | bytes:
        """Return the body as it goes to the broker, before compression."""
        return base64.b64decode(self.body) if self.is_binary else self.body

    def headers_to_resume(self, attempt: int, *, is_begun: bool) -> dict[str, Any]:
        """Return the headers for another publishing; what limits the first start is gone once it was begun."""
        kept = {name: value for name, value in self.headers.items() if name not in _ONCE}
        expires = None if is_begun else self.headers.get("expires")
        return kept | {"eta": None, "expires": expires, "retries": attempt - 1}


def captured(message: Any, delivery_info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what only the process that received a message can see of it."""
    headers = {name: value for name, value in message.headers.items() if name not in _FROM_BROKER}
    return {
        "headers": headers,
        "properties": _kept(message.properties or {}),
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "exchange": delivery_info.get("exchange") or "",
        "routing_key": delivery_info.get("routing_key") or "",
        "queue": None,
        "compression": headers.get("compression"),
    }


def _kept(source: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: source[name] for name in _KEPT_PROPERTIES if source.get(name) is not None}
    return {"priority": None} | kept  # None is a priority too: the message was sent without one


def _packed(text: str | bytes) -> dict[str, Any]:
    if isinstance(text, bytes):
        return {"body": base64.b64encode(text).decode(), "is_binary": True}
    return {"body": text, "is_binary": False}


def _name(exchange: Any) -> str:
    return str(getattr(exchange, "name", exchange) or "")
