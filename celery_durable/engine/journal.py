"""The records of a run, found by name and occurrence.

A key is fixed when a step is called, in program order: the first `charge` is `charge`, the next
`charge#2`. Steps may be moved, added and removed under a running run; where the order or the arguments
differ from the record, the journal says how.
"""

from collections import Counter
from collections.abc import Iterable

from celery_durable.errors import ConflictError
from celery_durable.store.steps import Record


class Journal:
    """What a run has recorded so far, and how far the body has come in it."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = {record.key: record for record in records}
        self._unvisited = dict.fromkeys(self._records)
        self._occurrences: Counter[str] = Counter()
        self._identities: dict[str, str] = {}
        self._last: Record | None = None
        self._next_seq = 1 + max((record.seq for record in self._records.values()), default=0)

    def next_key(self, name: str, identity: str) -> str:
        """Return the key of the next occurrence of `name`.

        Raises:
            ConflictError: when the name stands for another function in this run already.
        """
        known = self._identities.setdefault(name, identity)
        if known != identity:
            raise ConflictError(
                f"the step name {name!r} is used by two functions, {known} and {identity}; "
                "give one of them another name"
            )
        self._occurrences[name] += 1
        count = self._occurrences[name]
        return name if count == 1 else f"{name}#{count}"

    def next_seq(self) -> int:
        """Return the place of a record that is made now."""
        self._next_seq += 1
        return self._next_seq - 1

    def visit(self, key: str) -> Record | None:
        """Return the record under `key` and note that the body has come past it."""
        self._unvisited.pop(key, None)
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Note a record that was written now."""
        self._records[record.key] = record

    def difference(self, key: str, record: Record | None, kind: str, fingerprint: str | None) -> str | None:
        """Say in a sentence how the call under `key` differs from what was recorded, if it does."""
        last, self._last = self._last, record or self._last
        if record is None:
            ahead = next(iter(self._unvisited), None)
            return ahead and f"{key!r} is new in the code; the record goes on with {ahead!r} at this place"
        if record.kind != kind:
            return f"{key!r} was recorded as a {record.kind} but the code now takes it as a {kind}"
        if None not in (fingerprint, record.fingerprint) and fingerprint != record.fingerprint:
            return f"{key!r} was recorded with other arguments than the code now passes"
        if last is not None and record.seq < last.seq:
            return f"{key!r} was recorded before {last.key!r} but the code now takes it after"
        return None

    @property
    def unvisited(self) -> list[str]:
        """The recorded keys that the body has not come past, in the order in which they were made."""
        return list(self._unvisited)

    def __len__(self) -> int:
        return len(self._records)
