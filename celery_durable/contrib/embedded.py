"""A broker, a result backend and a store in one directory, for demos and laptops; not for production.

Every file appears whole under its final name, by a rename: nobody reads half of one, and of two
processes that take a message one gets it.

Nothing brings back a message that a killed worker had taken: the sweep sends those of durable runs
again, those of plain tasks are lost. Celery polls for the members of a chord here; use a real backend
where chords matter. One machine, one local disk.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any, ClassVar
from urllib.parse import quote

from celery.backends.filesystem import FilesystemBackend
from kombu.transport import filesystem
from kombu.transport.filesystem import exchange_queue_t as Binding
from kombu.transport.virtual.base import BrokerState
from kombu.utils.json import dumps, loads


def settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Make the folders in `directory` and return the Celery settings that keep everything there."""
    home = Path(directory).resolve()
    folders = {name: home / name for name in ("messages", "taken", "exchanges", "results")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {
        # Not in the URL: kombu takes no import path from there.
        "broker_transport": "celery_durable.contrib.embedded:Transport",
        "broker_url": f"filesystem://{folders['messages']}",
        "broker_transport_options": {
            "data_folder_in": str(folders["messages"]),
            "data_folder_out": str(folders["messages"]),
            "processed_folder": str(folders["taken"]),
            "control_folder": str(folders["exchanges"]),
        },
        "result_backend": f"celery_durable.contrib.embedded:Results+file://{folders['results']}",
        "durable_store_url": f"sqlite:///{home / 'durable.db'}",
    }


class Channel(filesystem.Channel):  # type: ignore[misc]
    """Kombu's channel over files, made safe for several processes."""

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:
        name = f"{time.time_ns():020d}_{uuid.uuid4()}.{queue}.msg"
        _write(os.path.join(self.data_folder_out, name), dumps(payload).encode())

    def _get(self, queue: str) -> dict[str, Any]:
        ending = f"{queue}.msg"
        names = os.listdir(self.data_folder_in)
        for name in sorted(name for name in names if name.partition(".")[2] == ending):
            taken = os.path.join(self.processed_folder, name)
            try:
                os.rename(os.path.join(self.data_folder_in, name), taken)
            except FileNotFoundError:  # another process was faster
                continue
            with open(taken, "rb") as file:
                message: dict[str, Any] = loads(file.read())
            if not self.store_processed:
                os.remove(taken)
            return message
        raise Empty

    def get_table(self, exchange: str) -> list[Binding]:
        """Return the bindings of an exchange."""
        try:
            return [Binding(*row) for row in loads(self._table(exchange).read_bytes())]
        except FileNotFoundError:
            return []

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        binding = Binding(routing_key or "", pattern or "", queue or "")
        self._change(exchange, lambda table: table if binding in table else [binding, *table])

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        self._purge(queue)
        exchange, routing_key, pattern = args[:3]
        binding = Binding(routing_key or "", pattern or "", queue or "")
        self._change(exchange, lambda table: [known for known in table if known != binding])

    def _change(self, exchange: str, changed: Callable[[list[Binding]], list[Binding]]) -> None:
        with self._locked():
            table = self.get_table(exchange)
            if (wanted := changed(table)) != table:
                _write(self._table(exchange), dumps(wanted).encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep everybody else from changing bindings: two who write their own would lose one."""
        with open(self.control_folder / "lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            yield

    def _table(self, exchange: str) -> Path:
        folder: Path = self.control_folder
        return folder / f"{quote(exchange, safe='')}.exchange"


class Transport(filesystem.Transport):  # type: ignore[misc]
    """Kombu's transport over files with the safe channel; it looks for messages every 50 ms."""

    Channel = Channel
    #: Or the URL, which is there to be shown, would be taken for a host and a virtual host.
    can_parse_url = True
    polling_interval = 0.05
    #: What is declared, per directory: kombu's own one for all hides a binding that only another one has.
    _states: ClassVar[dict[str, BrokerState]] = {}

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        folder = str(client.transport_options.get("control_folder", "control"))
        self.state = self._states.setdefault(folder, BrokerState())


class Results(FilesystemBackend):  # type: ignore[misc]
    """Celery's result backend over files, whose files are never seen half written."""

    def set(self, key: bytes | str, value: bytes | str) -> None:
        """Store a value."""
        _write(os.fsdecode(self._filename(key)), value.encode() if isinstance(value, str) else value)


def _write(path: str | Path, content: bytes) -> None:
    # In the same folder, or the rename would be a copy; the dot keeps it from being taken for a message.
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
