"""Every example of the documentation does what its page says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, examples, python_of


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_python_example_runs(page: Path, tmp_path: Path) -> None:
    # A process for each page: an app, its tasks and its settings must not reach the next one.
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.pages", str(page)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_example_that_is_not_executed_says_why() -> None:
    reasons = [e.comments["not executed"] for page in PAGES for e in examples(page) if "not executed" in e.comments]

    assert all(reason.strip() for reason in reasons)
