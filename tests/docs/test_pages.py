"""The built pages are drawn by a real browser without a complaint."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    built = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(built / "trees"), "docs", str(built)]
    subprocess.run(command, cwd=ROOT, check=True)
    return built


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("index", "Durable execution"),
        ("quickstart", "celery_durable"),
        ("explanation/how-it-works", "<svg"),
        ("reference/settings", "durable_lease"),
        ("reference/api", "durable_task"),
    ],
)
def test_a_page_is_drawn_without_an_error(html: Path, tmp_path: Path, page: str, expected: str) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={tmp_path}"]
    logging = ["--enable-logging=stderr", "--log-level=0", "--dump-dom"]

    drawn = subprocess.run(
        [str(CHROMIUM), *options, *logging, f"file://{html / page}.html"], capture_output=True, text=True, timeout=60
    )

    assert drawn.returncode == 0
    assert expected in drawn.stdout
    assert not [line for line in drawn.stderr.splitlines() if ":CONSOLE" in line and "rror" in line]
