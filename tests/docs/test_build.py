"""The documentation builds without a warning, and names nothing that does not exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import PAGES, ROOT

_LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)#\s]+)")
_TEST = re.compile(r"`(test_\w+)`")


def test_the_pages_build_with_warnings_as_errors(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]

    built = subprocess.run([*command, "docs", str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True)

    assert built.returncode == 0, built.stderr
    assert "<svg" in (tmp_path / "html" / "reference" / "states.html").read_text()


def test_the_links_of_the_readme_lead_to_files() -> None:
    missing = [link for link in _LINK.findall((ROOT / "README.md").read_text()) if not (ROOT / link).exists()]

    assert not missing


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in _TEST.findall(page.read_text())}
    files = [path for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert named <= defined, named - defined
