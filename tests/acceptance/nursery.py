"""Starts worker processes quickly: one process imports everything slow and forks itself for each.

Hundreds of workers are killed by the crash matrix; a fork saves each of them a second of imports. What
is forked has read no setting yet, so every worker is configured by its own environment, as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

from tests.acceptance.harness import ROOT


class Nursery:
    """The process that forks, as seen by a test."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.acceptance.nursery"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._ended: dict[int, int] = {}
        self._unread = b""

    def start(self, module: str, *arguments: str, log: Path, directory: Path, **environment: str) -> int:
        """Run `python -m module arguments` in a session of its own and return its process id."""
        order = {
            "argv": [module, *arguments],
            "log": str(log),
            "directory": str(directory),
            "environment": environment,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            said = self._read(timeout=10)
            assert said is not None, "the nursery does not answer"
            if "started" in said:
                return int(said["started"])

    def is_alive(self, pid: int) -> bool:
        while self._read(timeout=0) is not None:
            pass
        return pid not in self._ended

    def status(self, pid: int) -> int:
        """Return how a process that is not alive any more has ended."""
        return self._ended[pid]

    def kill(self, pid: int) -> None:
        """Kill a process and its group, if it is still there."""
        if self.is_alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and whatever it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _read(self, timeout: float) -> dict[str, int] | None:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                return None
            piece = os.read(self._process.stdout.fileno(), 65536)
            assert piece, "the nursery has ended"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, int] = json.loads(line)
        if "ended" in said:
            self._ended[said["ended"]] = said["status"]
        return said


def main() -> None:
    """Fork as told on the standard input until it ends; nothing survives its end."""
    import alembic.command  # noqa: F401
    import billiard.pool  # noqa: F401
    import celery.apps.worker
    import celery.backends.redis
    import celery.bin.celery
    import celery.concurrency.prefork
    import celery.concurrency.solo
    import celery.worker.consumer  # noqa: F401
    import kombu.transport.redis  # noqa: F401
    import psycopg  # noqa: F401
    import sqlalchemy.dialects.postgresql.psycopg
    import sqlalchemy.dialects.sqlite  # noqa: F401

    import celery_durable.worker.bootstep  # noqa: F401

    children: set[int] = set()
    unread = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            piece = os.read(0, 65536)
            if not piece:
                break
            unread += piece
        while b"\n" in unread:
            line, _, unread = unread.partition(b"\n")
            pid = os.fork()
            if not pid:
                _become(json.loads(line))
            children.add(pid)
            _say(started=pid)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # its own children
            _say(ended=pid, status=status)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _say(**words: int) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def _become(order: dict[str, object]) -> None:
    """Turn this fork into the process that was ordered; does not return."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        output = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.chdir(str(order["directory"]))
        os.environ.update(order["environment"])  # type: ignore[arg-type]
        sys.argv = list(order["argv"])  # type: ignore[call-overload]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if not isinstance(exit_.code, int) and exit_.code is not None:
            sys.stderr.write(f"{exit_.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
