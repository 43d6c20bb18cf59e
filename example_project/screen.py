"""Draws the demo: a live tree per order in a terminal, plain lines anywhere else."""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from example_project.shop import Order
from example_project.story import Line

TREE_WIDTH = 33  # three of them in 100 columns
STYLES = {
    "kept": ("✓", "bold green"),
    "ran again": ("↻", "bold yellow"),
    "runs again": ("↻", "bold yellow"),
    "cut off": ("✗", "bold red"),
    "ran": ("✓", "default"),
    "waited": ("✓", "default"),
    "runs": ("▸", "cyan"),
    "": ("·", "bright_black"),
}
WAITS = ("◔", "magenta")
LEGEND = Text.from_markup(
    "[bold green]✓ kept[/]: on record at the crash   "
    "[bold yellow]↻ ran again[/]: was cut off   [bold]✓ ran[/]: not affected"
)


class Screen:
    """Where the demo speaks."""

    def __init__(self, orders: list[Order]) -> None:
        self._console = Console(highlight=False)
        self._orders = orders
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._began = time.monotonic()
        self._shown: dict[str, dict[str, str]] = {order.id: {} for order in orders}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, *, title: str = "") -> None:
        """Print a sentence of the story, or of its moral with a title; it stays."""
        if title:
            self._console.print()
        row = Table.grid(padding=(0, 1))
        row.add_row(title or f"[bright_black]{self._now()}[/]", text)
        self._console.print(row)

    def show(self, lines: dict[str, list[Line]]) -> None:
        """Show how the orders stand now."""
        if self._live:
            self._live.update(Group(self._trees(lines), LEGEND), refresh=True)
        else:
            self._print_news(lines)

    def finish(self, lines: dict[str, list[Line]]) -> None:
        """Show how the orders ended."""
        self.show(lines)
        if not self._live:
            self._console.print()
            self._console.print(self._trees(lines), LEGEND, sep="\n")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first two columns are words, the others stand right."""
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print()
        self._console.print(table)

    def _print_news(self, lines: dict[str, list[Line]]) -> None:
        for order_id, found in lines.items():
            shown = self._shown[order_id]
            states = {line.label: "waits" if line.state.endswith("left") else line.state for line in found}
            news = [f"{label} {state}" for label, state in states.items() if state != shown.get(label, "")]
            # That a short step has begun is no news here, only that a charge has.
            news = [new for new in news if not new.endswith(" runs") or new.startswith("charge")]
            if news:
                self._console.print(f"{self._now()}   {order_id}: {', '.join(news)}")
            shown.update(states)

    def _trees(self, lines: dict[str, list[Line]]) -> Table:
        count = max(1, min(3, self._console.width // TREE_WIDTH))
        grid = Table.grid(*(Column(width=TREE_WIDTH) for _ in range(count)))
        is_low = count < 3 and self._live is not None and self._console.height < 32
        trees = [_tree(order, _folded(lines[order.id]) if is_low else lines[order.id]) for order in self._orders]
        for first in range(0, len(trees), count):
            grid.add_row(*trees[first : first + count])
        return grid

    def _now(self) -> str:
        return f"{time.monotonic() - self._began:4.1f} s"


def _tree(order: Order, lines: list[Line]) -> Tree:
    tree = Tree(Text.assemble((f"{order.id} ", "bold"), order.customer), guide_style="bright_black")
    for line in lines:
        icon, style = STYLES.get(line.state, WAITS)
        tree.add(Text(f"{icon} {line.label:<15} {line.state}", style=style, no_wrap=True))
    return tree


def _folded(lines: list[Line]) -> list[Line]:
    """Make one line of an order's parcels, for a screen that has too few."""
    parcels = [line for line in lines if line.label.startswith("pack_item")]
    current = next((line for line in parcels if not line.is_recorded), parcels[-1])
    one = replace(current, label=f"pack_item x{len(parcels)}")
    return [*lines[:3], one, *lines[3 + len(parcels) :]]
