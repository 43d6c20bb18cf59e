"""The quickstart, typed as it stands: a real worker, killed with -9 while a step is running."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Example, examples

PAGE = ROOT / "docs" / "quickstart.md"
TIMEOUT = 60.0


class Terminal:
    """Types the commands of a page in one folder; a worker is left running, in a terminal of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers: list[subprocess.Popen[bytes]] = []
        self.log = directory / "worker.log"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Wide, so that no table breaks a line; the package is found also where it was not installed.
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{_metadata(directory)}",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "240",
        }

    def type(self, command: str) -> str:
        """Execute a command and return what it printed."""
        if command.startswith(("python3 -m venv", ". .venv", "pip install")):
            return ""  # this environment has them already
        if " worker " in command:
            for worker in self.workers:
                worker.wait(10)  # as a shell does: a zombie would still count as running
            self._start_worker(command)
            return ""
        done = subprocess.run(
            command, shell=True, cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}\n{self.printed()[-3000:]}"
        return done.stdout

    def printed(self) -> str:
        """Return what the workers printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until a worker has printed something."""
        end = time.monotonic() + TIMEOUT
        while text not in self.printed():
            assert time.monotonic() < end, f"no worker printed {text!r}\n{self.printed()[-3000:]}"
            time.sleep(0.05)

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(10)

    def _start_worker(self, command: str) -> None:
        with self.log.open("ab") as output:
            worker = subprocess.Popen(
                f"exec {command}",
                shell=True,
                cwd=self.directory,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.workers.append(worker)


def _metadata(directory: Path) -> Path:
    """Write what an installation would: that `celery` has a command `durable`."""
    home = directory / ".metadata"
    info = home / "celery_durable-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: celery-durable\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[celery.commands]\ndurable = celery_durable.cli:durable\n")
    return home


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def _commands(example: Example) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block with the lines that it is to print."""
    command, expected = None, []
    for line in example.text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, expected
            command, expected = line.removeprefix("$ "), []
        elif line.strip():
            expected.append(line)
    if command is not None:
        yield command, expected


def _fits(expected: list[str], printed: str) -> bool:
    """Return whether the expected lines come in this order; `…` stands for anything within a line."""
    lines = iter(printed.splitlines())
    patterns = [re.compile(".*?".join(map(re.escape, line.split("…"))) + r"\s*$") for line in expected]
    return all(any(pattern.match(line) for line in lines) for pattern in patterns)


@pytest.mark.skipif(shutil.which("sh") is None, reason="the commands are for a POSIX shell")
def test_the_quickstart_works_as_typed(terminal: Terminal) -> None:
    for example in examples(PAGE):
        if "file" in example.comments:
            (terminal.directory / example.comments["file"]).write_text(example.text)
        if example.language != "console":
            continue
        if "wait for" in example.comments:
            terminal.wait_for(example.comments["wait for"])
        for command, expected in _commands(example):
            printed = terminal.type(command)

            assert _fits(expected, printed), f"$ {command}\n{printed}\nexpected:\n" + "\n".join(expected)

    assert terminal.printed().count("charging order 42") == 1, "the recorded step ran again"
    assert terminal.printed().count("packing order 42") == 2, "the step that was killed did not run again"
