"""A message that was stored is published again with all that it carried."""

import json
from typing import Any

import pytest

from celery_durable.messages.envelope import Envelope, captured

BODY = ([1, "zwei"], {"three": 3}, {"callbacks": [{"task": "t"}], "errbacks": None, "chain": None, "chord": None})
HEADERS = {"id": "run-1", "task": "shop.order", "group": "g", "stamps": {"a": 1}, "expires": "2030-01-01", "retries": 0}


def published(**options: Any) -> Envelope:
    given = {"headers": HEADERS, "serializer": "json", "routing_key": "celery", "exchange": "", "priority": 7}
    return Envelope.of_publish(BODY, given | options)


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
def test_a_message_comes_back_from_its_text_whatever_its_serializer(serializer: str) -> None:
    if serializer in ("yaml", "msgpack"):
        pytest.importorskip(serializer)
    envelope = published(serializer=serializer)

    back = Envelope.from_text(envelope.to_text())

    assert back == envelope
    assert back.payload() == envelope.payload()
    assert [list(part) if isinstance(part, tuple) else part for part in back.decoded()] == list(BODY)


def test_the_stored_text_is_json() -> None:
    stored = json.loads(published(serializer="pickle").to_text())

    assert (stored["is_binary"], stored["content_type"]) == (True, "application/x-python-serialize")


def test_priority_and_reply_queue_are_kept() -> None:
    envelope = published(reply_to="here", correlation_id="run-1", delivery_mode=2, retry=True)

    assert envelope.properties == {"priority": 7, "reply_to": "here", "correlation_id": "run-1", "delivery_mode": 2}


def test_a_resumed_message_carries_all_headers_but_those_of_one_publishing() -> None:
    envelope = published(headers=HEADERS | {"eta": "2029-01-01", "redelivered": True, "compression": "gzip"})

    headers = envelope.headers_to_resume(3, is_begun=True)

    assert headers == {"id": "run-1", "task": "shop.order", "group": "g", "stamps": {"a": 1}} | {
        "eta": None,
        "expires": None,
        "retries": 2,
    }


def test_a_message_that_was_never_begun_still_expires() -> None:
    assert published().headers_to_resume(1, is_begun=False)["expires"] == HEADERS["expires"]


def test_what_a_broker_added_is_not_kept() -> None:
    class Message:
        headers = HEADERS | {"x-death": object(), "x-delivery-count": 3}
        properties = {"priority": 7, "delivery_tag": "t"}  # noqa: RUF012
        content_type = "application/json"
        content_encoding = "utf-8"

    kept = captured(Message(), {"exchange": None, "routing_key": "celery"})

    assert (kept["headers"], kept["properties"]) == (HEADERS, {"priority": 7})
    assert (kept["exchange"], kept["routing_key"]) == ("", "celery")
