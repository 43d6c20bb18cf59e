"""What users write type-checks, and what they must not write does not."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_user_code_type_checks_strictly() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "tests/typing/api.py"]

    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert checked.returncode == 0, checked.stdout + checked.stderr
