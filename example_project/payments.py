"""A payment provider in one file: every request, and every time money moved, is a line of its ledger.

It keeps the promise that real ones make for their idempotency keys: the same key moves money once.
"""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

BANK_SECONDS = 1.0
ANSWER_SECONDS = 0.6


class PaymentProvider:
    """Charges customers; each call takes as long as such calls take."""

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger

    def charge(self, *, order_id: str, cents: int, currency: str, idempotency_key: str) -> str:
        """Move the money unless this key has done so before; return the id of the charge."""
        entry = {"key": idempotency_key, "order": order_id, "cents": cents, "currency": currency}
        self._append("requested", entry)
        time.sleep(BANK_SECONDS)
        charge_id = self._move_once(entry)
        time.sleep(ANSWER_SECONDS)  # the money has moved and the shop does not know it yet
        return charge_id

    def entries(self, what: str) -> list[dict[str, Any]]:
        """Return the ledger's lines of one kind: "requested" or "moved"."""
        lines = self._ledger.read_text().splitlines() if self._ledger.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["what"] == what]

    def _move_once(self, entry: dict[str, Any]) -> str:
        with self._ledger.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            moved = self.entries("moved")
            for known in moved:
                if known["key"] == entry["key"]:
                    return str(known["charge"])
            charge_id = f"ch_{len(moved) + 1:04d}"
            self._append("moved", {**entry, "charge": charge_id})
            return charge_id

    def _append(self, what: str, entry: dict[str, Any]) -> None:
        with self._ledger.open("a") as ledger:
            ledger.write(json.dumps({"what": what, **entry}) + "\n")
