"""What the parts of this package share of one Celery app: its settings, its store, this worker.

It is made from the app's configuration at first use and belongs to the `Durable` that the app was given.
"""

import mmap
import socket
from collections.abc import Callable
from typing import TypeVar

from celery_durable.settings import Settings
from celery_durable.store.database import Connection, Database

T = TypeVar("T")


class Runtime:
    """The settings and the store of one app, as this process sees them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.store_url, settings.schema_name)
        #: The name under which this process holds runs; a worker gives itself one that no other has.
        self.worker = socket.gethostname()
        self.is_worker = False
        # One shared byte: pool processes that were forked see what the main process writes.
        self._draining = mmap.mmap(-1, 1)

    def become_worker(self, name: str) -> None:
        """Say that this process, and those it forks, are the worker `name`."""
        self.worker, self.is_worker = name, True
        self._draining[0] = 0

    def is_draining(self) -> bool:
        """Return whether this worker shuts down and wants its runs back."""
        return self._draining[0] != 0

    def drain(self) -> None:
        """Ask the pool to hand its runs back at their next step; safe inside a signal handler."""
        self._draining[0] = 1

    def execute(self, operation: Callable[[Connection], T]) -> T:
        """Run an operation on the store: inside a worker until it answers, elsewhere once.

        Raises:
            StoreUnavailable: when the store does not answer.
        """
        if self.is_worker:
            return self.database.patiently(operation, self.is_draining)
        return self.database.once(operation)
