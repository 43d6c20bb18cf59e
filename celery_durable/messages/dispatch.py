"""Publishes the messages of runs: at the start, on every resume, and once more when one seems lost.

A message is a hint. What cannot be published now is published by the sweeper later, so a broker that is
away fails no caller.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from kombu import Producer
from kombu.exceptions import OperationalError

from celery_durable.messages.envelope import Envelope
from celery_durable.runtime import Runtime
from celery_durable.store import runs

logger = logging.getLogger(__name__)

#: What a broker that is away raises, whatever the transport.
BROKER_ERRORS: tuple[type[Exception], ...] = (OperationalError, ConnectionError, TimeoutError, OSError)


class StoringProducer:
    """Stands in for a producer while Celery sends one durable task: stores the finished message, then sends it.

    Args:
        producer: the producer that sends.
        task_id: whose message is meant; others, of events say, pass through.
        store: stores an envelope and says whether it is to be sent now.
    """

    def __init__(self, producer: Producer, task_id: str, store: Callable[[Envelope], bool]) -> None:
        self._producer = producer
        self._task_id = task_id
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        """Store the message and send it; a broker that is away is left to the sweeper."""
        if (options.get("headers") or {}).get("id") != self._task_id:
            return self._producer.publish(body, **options)
        envelope = Envelope.of_publish(body, options)
        if not self._store(envelope):
            return None
        options.pop("serializer", None)
        serialised = {"content_type": envelope.content_type, "content_encoding": envelope.content_encoding}
        try:
            return self._producer.publish(envelope.payload(), **serialised, **options)
        except BROKER_ERRORS as error:
            logger.warning("run %s is stored; its message follows when the broker is back: %s", self._task_id, error)
            return None


def send_stored(app: Celery, runtime: Runtime, run_ids: Sequence[str], producer: Producer | None = None) -> list[str]:
    """Publish the messages of these runs as they are stored; what the broker does not take is left to the sweeper.

    Returns:
        The runs whose stored message nobody can read.
    """
    broken = []
    messages = runtime.execute(lambda conn: runs.envelopes(conn, run_ids))
    try:
        with app.producer_or_acquire(producer) as sender:
            for message in messages.values():
                try:
                    envelope = Envelope.from_text(message.envelope)
                except (TypeError, ValueError):
                    broken.append(message.run_id)
                else:
                    resume(app, sender, envelope, attempt=message.attempt, is_begun=message.is_begun)
    except BROKER_ERRORS as error:
        logger.warning("runs are due but the broker does not answer; they follow when it is back: %s", error)
    return broken


def resume(app: Celery, producer: Producer, envelope: Envelope, *, attempt: int, is_begun: bool) -> None:
    """Publish the message of a run again, under its own id and with all that it carried.

    Raises:
        kombu.exceptions.OperationalError: when the broker does not answer.
    """
    declare = [app.amqp.queues[envelope.queue or envelope.routing_key]] if _is_declared(app, envelope) else []
    producer.publish(
        envelope.payload(),
        headers=envelope.headers_to_resume(attempt, is_begun=is_begun),
        exchange=envelope.exchange,
        routing_key=envelope.routing_key,
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        compression=envelope.compression,
        declare=declare,
        retry=True,
        retry_policy=dict(app.conf.task_publish_retry_policy),
        **({"delivery_mode": 2} | envelope.properties),
    )


def _is_declared(app: Celery, envelope: Envelope) -> bool:
    # The anonymous exchange routes by queue name, so that name is a queue even where no one noted it.
    name = envelope.queue or (envelope.routing_key if not envelope.exchange else None)
    return name is not None and (name in app.amqp.queues or bool(app.conf.task_create_missing_queues))
