"""Installs durable tasks into a Celery app."""

from collections.abc import Sequence
from typing import Any

from celery import Celery

from celery_durable.errors import UsageError
from celery_durable.handle import RunHandle
from celery_durable.messages import dispatch
from celery_durable.runtime import Runtime
from celery_durable.settings import Settings
from celery_durable.states import RunState
from celery_durable.store import queries, runs, schema
from celery_durable.store.queries import HistoryEntry, Run, StepRecord
from celery_durable.worker import control
from celery_durable.worker.bootstep import Keeper


class Durable:
    """Durable execution for one Celery app; also reachable as `app.durable`.

    Args:
        app: the app.
        overrides: settings without their prefix, `lease=30` for `durable_lease`; they win over `app.conf`.

    Raises:
        SettingsError: for an unknown setting or a value that has no use; when the app has not read its
            configuration yet, at the first use.
    """

    def __init__(self, app: Celery, **overrides: Any) -> None:
        self.app = app
        self._overrides = overrides
        self._runtime: Runtime | None = None
        app.durable = self
        app.steps["worker"].add(Keeper)
        app.steps["consumer"].add(control.UnknownTasks)
        control.install()
        if app.configured:
            self.runtime  # noqa: B018 - a wrong setting is said now
        else:
            app.on_after_configure.connect(self._on_configured, weak=False)

    @property
    def runtime(self) -> Runtime:
        """The settings and the store."""
        if self._runtime is None:
            found = _configured(self.app)
            if self._runtime is None:  # reading the configuration may have led here already
                self._runtime = Runtime(Settings.read(found, self._overrides))
                _hide_password(self.app, self._runtime)
        return self._runtime

    @property
    def settings(self) -> Settings:
        """The settings of this app."""
        return self.runtime.settings

    @property
    def runs(self) -> "Runs":
        """The runs of this app's store."""
        return Runs(self)

    def migrate(self) -> str:
        """Create the tables of the store, or bring them to this release; return their version.

        Raises:
            SchemaError: when they are newer than this release.
            StoreUnavailable: when the store does not answer.
        """
        return schema.migrate(self.runtime.database)

    def prune(self) -> int:
        """Delete the runs that `durable_retention` no longer keeps, as the workers do; return how many."""
        keep, total = self.settings.retention, 0
        while gone := self.runtime.database.atomically(lambda conn: runs.prune(conn, keep=keep, most=500)):
            total += gone
        return total

    def sql(self) -> str:
        """Return the statements that create the tables from nothing."""
        return schema.sql(self.runtime.database)

    def _on_configured(self, sender: Any = None, **_: Any) -> None:
        self.runtime  # noqa: B018


class Runs:
    """Reads and steers runs, without any worker."""

    def __init__(self, durable: Durable) -> None:
        self._durable = durable

    def get(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            UsageError: when there is none of this id.
        """
        return self.handle(run_id).run

    def handle(self, run_id: str) -> RunHandle:
        """Return the handle of a run, whether it exists or not."""
        return RunHandle(run_id, app=self._durable.app, runtime=self._durable.runtime)

    def list(self, *, task: str | None = None, state: str | None = None, limit: int = 50) -> list[Run]:
        """Return the runs that were started last, the newest first.

        Raises:
            UsageError: for an unknown state.
        """
        if state is not None and state not in list(RunState):
            raise UsageError(f"expected one of {', '.join(RunState)}, got: {state!r}")
        database = self._durable.runtime.database
        return database.once(lambda conn: queries.latest(conn, task=task, state=state, limit=limit))

    def steps(self, run_id: str) -> Sequence[StepRecord]:
        """Return the records of a run."""
        return self.handle(run_id).steps

    def history(self, run_id: str) -> Sequence[HistoryEntry]:
        """Return every move of a run."""
        return self.handle(run_id).history

    def cancel(self, run_id: str, *, why: str = "cancelled by an operator") -> bool:
        """Cancel a run, or ask its worker to; return whether it had not ended."""
        return self.handle(run_id).cancel(why)

    def retry(self, run_id: str, *, why: str = "retried by an operator") -> bool:
        """Take up a run that has failed, was cancelled or expired, from its failed step with a fresh budget.

        Returns:
            Whether it was taken up; not when it has succeeded or is still going on.
        """
        runtime = self._durable.runtime
        interval = runtime.settings.sweep_interval
        moved = runtime.database.once(lambda conn: runs.retry(conn, run_id, who="operator", why=why, resend=interval))
        if moved:
            dispatch.send_stored(self._durable.app, runtime, [run_id])
        return moved


def _configured(app: Celery) -> dict[str, Any]:
    """Return the app's `durable_*` settings, also where its configuration object has a namespace."""
    namespace = f"{app.namespace.lower()}_" if app.conf is not None and app.namespace else ""
    names = {str(key).lower().removeprefix(namespace) for key in app.conf}
    return {name: app.conf[name] for name in names if name.startswith("durable_")}


def _hide_password(app: Celery, runtime: Runtime) -> None:
    """Keep the store's password out of what Celery prints of its configuration."""
    if "durable_store_url" in app.conf and runtime.database.url.password:
        app.conf.durable_store_url = runtime.database.url.render_as_string(hide_password=True)
