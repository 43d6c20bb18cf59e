"""`celery -A <app> durable …`: prints what the store holds and steers runs.

Exit codes: 0 done, 1 refused, 2 usage.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import click

from celery_durable.errors import DurableError


@click.group()
@click.pass_context
def durable(context: click.Context) -> None:
    """Durable runs: their tables, their records, their fate."""
    app = context.obj.app
    app.loader.import_default_modules()
    installed = getattr(app, "durable", None)
    if installed is None:
        raise click.UsageError(f"the app {app.main!r} has no durable tasks; call Durable(app) where it is made")
    context.obj.durable = installed


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hand the command its `Durable`, and turn what it refuses into a sentence and exit code 1."""

    @click.pass_context
    @functools.wraps(function)
    def command(context: click.Context, *args: Any, **options: Any) -> None:
        try:
            function(context.obj.durable, *args, **options)
        except DurableError as error:
            click.echo(f"durable: {error}", err=True)
            context.exit(1)

    return command


@durable.command()
@click.option("--sql", "as_sql", is_flag=True, help="Print the statements that create the tables, change nothing.")
@_command
def migrate(installed: Any, as_sql: bool) -> None:
    """Create the tables, or bring them to this release."""
    if as_sql:
        click.echo(installed.sql())
    else:
        click.echo(f"the tables are of version {installed.migrate()}")


@durable.command()
@_command
def prune(installed: Any) -> None:
    """Delete the finished runs that durable_retention no longer keeps."""
    click.echo(f"{installed.prune()} runs deleted")


@durable.command("list")
@click.option("--task", help="Runs of this task only.")
@click.option("--state", help="Runs in this state only.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_command
def list_(installed: Any, task: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List the runs that were started last."""
    columns = ("id", "task", "state", "attempt", "wait", "created_at", "error")
    _print(installed.runs.list(task=task, state=state, limit=limit), columns, as_json)


@durable.command()
@click.argument("run_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_command
def show(installed: Any, run_id: str, as_json: bool) -> None:
    """Show a run and its records."""
    run, steps = installed.runs.get(run_id), installed.runs.steps(run_id)
    if as_json:
        click.echo(_json({**_plain(run), "steps": [_plain(step) for step in steps]}))
        return
    _print([run], ("id", "task", "state", "attempt", "wait", "wake_at", "worker", "error"), as_json=False)
    _print(steps, ("key", "kind", "state", "attempts", "output", "error", "finished_at"), as_json=False)


@durable.command()
@click.argument("run_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_command
def history(installed: Any, run_id: str, as_json: bool) -> None:
    """Show every move of a run."""
    installed.runs.get(run_id)
    _print(installed.runs.history(run_id), ("at", "what", "who", "why", "epoch", "version"), as_json)


@durable.command()
@click.argument("run_id")
@click.option("--why", default="cancelled on the command line", help="What its history is to say.")
@_command
def cancel(installed: Any, run_id: str, why: str) -> None:
    """Cancel a run, or ask its worker to."""
    installed.runs.get(run_id)
    _say(installed.runs.cancel(run_id, why=why), f"run {run_id} is cancelled", f"run {run_id} has ended already")


@durable.command()
@click.argument("run_id")
@click.option("--why", default="retried on the command line", help="What its history is to say.")
@_command
def retry(installed: Any, run_id: str, why: str) -> None:
    """Take up an ended run again, from its failed step."""
    installed.runs.get(run_id)
    _say(installed.runs.retry(run_id, why=why), f"run {run_id} goes on", f"run {run_id} cannot be retried as it stands")


def _say(done: bool, yes: str, no: str) -> None:
    click.echo(yes if done else no, err=not done)
    if not done:
        sys.exit(1)


def _print(values: Iterable[Any], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        click.echo(_json([_plain(value) for value in values]))
        return
    from rich.console import Console  # Celery imports this module at every start
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=name in ("id", "key"), overflow="fold")
    for value in values:
        table.add_row(*(_cell(getattr(value, name)) for name in columns))
    # A pipe has no width; whoever reads it wants whole lines.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    return "" if value is None else str(value)


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, indent=2)
