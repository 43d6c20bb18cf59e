"""Sets up a checkout of celery-durable and runs what it can do: `python3 dev.py` lists it.

Needs nothing but Python and a package index: it builds `.venv` beside this file, once, and does it
again when the requirements change.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this file is read by any Python 3 that is there
    sys.exit("celery-durable needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])  # noqa: UP031

import contextlib
import hashlib
import importlib.util
import os
import re
import ssl
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP_WHEEL = "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
USAGE = """\
usage: python3 dev.py COMMAND [ARGS…]

  demo    run the example shop
  test    check the code, then run the tests; ARGS go to pytest, --no-lint skips the checks
  lint    check the code only
  bench   run the benchmarks
  docs    build the documentation into build/docs
  shell   open a shell in which `python` and `celery` are those of .venv, or run ARGS in it
"""


def main(command: str = "", *args: str) -> int:
    """Run one command and return its exit code."""
    if command not in COMMANDS:
        print(USAGE, end="")
        return 0 if command in ("", "help", "-h", "--help") else 2
    set_up("bench" if command == "bench" else "dev")
    return COMMANDS[command](list(args))


def demo(args: list[str]) -> int:
    return python("-m", "example_project.demo", *args)


def test(args: list[str]) -> int:
    if "--no-lint" in args:
        args.remove("--no-lint")
    elif code := lint([]):
        print("the checks failed, so the tests did not run; --no-lint runs them all the same", file=sys.stderr)
        return code
    return python("-m", "pytest", "-n", "2", "--dist", "loadfile", *args)


def lint(args: list[str]) -> int:
    """Run every check, also after one failed."""
    checks = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["lint-imports", "--no-logo"])
    code = 0
    for name, *rest in checks:
        print("$", name, *rest, flush=True)
        code = run(VENV / "bin" / name, *rest) or code
    return code


def bench(args: list[str]) -> int:
    return python("-m", "tests.benchmarks", *args)


def docs(args: list[str]) -> int:
    return python("-m", "sphinx", "-W", "--keep-going", *args, "docs", "build/docs")


def shell(args: list[str]) -> int:
    return run(*(args or [os.environ.get("SHELL", "/bin/sh")]))


COMMANDS = {"demo": demo, "test": test, "lint": lint, "bench": bench, "docs": docs, "shell": shell}


def python(*args: str) -> int:
    return run(PYTHON, *args)


def run(*command: str | Path) -> int:
    """Run a command in the environment of `.venv` and return its exit code."""
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": path})
    while True:
        try:
            code = child.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            pass  # the terminal has told the child as well; let it clean up


def set_up(kind: str) -> None:
    """Make `.venv` hold exactly what requirements/dev.txt says, and for "bench" also bench.txt."""
    wanted = {"dev": fingerprint("requirements/dev.txt"), "bench": fingerprint("requirements/bench.txt")}
    stamps = {name: VENV / f"{name}.stamp" for name in wanted}
    missing = [n for n in ("dev", kind) if not stamps[n].exists() or stamps[n].read_text() != wanted[n]]
    if not missing:
        return
    started = time.monotonic()
    if not PYTHON.exists() or "dev" in missing:
        create_venv()
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    for name in dict.fromkeys(missing):
        # The pins are complete, so nothing is left to resolve; what is imported is compiled then.
        fast = ["--no-deps", "--no-compile"]
        phase(f"installing requirements/{name}.txt", *pip, *fast, "-r", f"requirements/{name}.txt")
        if name == "dev":
            # The build backend is among the requirements: nothing more is downloaded for it.
            phase("installing celery-durable", *pip, "--no-deps", "--no-build-isolation", "-e", ".")
        stamps[name].write_text(wanted[name])
    print(f"ready in {time.monotonic() - started:.1f} s\n", flush=True)


def fingerprint(requirements: str) -> str:
    # The place counts too: a virtual environment does not survive being moved.
    parts = [sys.version.encode(), str(VENV).encode()]
    parts += [(ROOT / name).read_bytes() for name in (requirements, "pyproject.toml")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def create_venv() -> None:
    if importlib.util.find_spec("venv") is None:
        sys.exit("this Python has no venv module; install it, on Debian and Ubuntu: apt install python3-venv")
    phase("creating .venv", sys.executable, "-m", "venv", "--clear", "--without-pip", VENV)
    # A current pip installs in half the time that the one which came with Python takes.
    try:
        wheel = download_pip()
    except (OSError, LookupError) as error:
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit(f"cannot download pip ({error}); install python3-venv or set PIP_INDEX_URL")
        phase("installing the pip of this Python", PYTHON, "-m", "ensurepip")
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / PIP_WHEEL
        path.write_bytes(wheel)
        phase("installing pip", PYTHON, path / "pip", "install", "--no-index", "--no-compile", path)


def download_pip() -> bytes:
    """Return the pip wheel from the package index that pip itself would ask."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    page = download(index).decode()
    # An index answers in HTML or, some of them, in JSON.
    link = re.search(r"""(?:href=|"url":\s*)["']([^"'#]*""" + re.escape(PIP_WHEEL) + ")", page)
    if link is None:
        raise LookupError(f"the package index has no {PIP_WHEEL}")
    wheel = download(urllib.parse.urljoin(index, link[1]))
    if hashlib.sha256(wheel).hexdigest() != PIP_SHA256:
        sys.exit(f"the package index sent a {PIP_WHEEL} that is not the published one")
    return wheel


def download(url: str) -> bytes:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(url, timeout=15, context=context) as answer:
        content: bytes = answer.read()
    return content


def phase(title: str, *command: str | Path) -> None:
    """Run one phase of the set-up: say how long it takes, and what it said only if it fails."""
    started = time.monotonic()
    live = sys.stdout.isatty()
    print(title, end=" … ", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as child:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
                if live:
                    print(f"\r{title} … {time.monotonic() - started:.0f} s", end="", flush=True)
        if child.returncode:
            log.seek(0)
            print(f"failed\n{log.read()[-6000:]}", flush=True)
            sys.exit(child.returncode)
    print(f"\r{title} … {time.monotonic() - started:.1f} s" if live else f"{time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
