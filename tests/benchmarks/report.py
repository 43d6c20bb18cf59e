"""Turns pairs of measurements into ratios with their spread, and those into a table.

A result is never one number alone: the median of the rounds comes with the lowest and the highest.
"""

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/explanation/performance.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    what: str
    target: str
    measured: str
    is_met: bool | None
    absolute: str

    def row(self) -> str:
        """Return the row as Markdown."""
        met = {True: "yes", False: "**no**", None: ""}[self.is_met]
        return f"| {self.what} | {self.target} | {self.measured} | {met} | {self.absolute} |"


def by_turns(rounds: int, *sides: Callable[[], float]) -> list[tuple[float, ...]]:
    """Call every side once for warmth, then one after the other in each of `rounds` rounds."""
    for side in sides:
        side()
    return [tuple(side() for side in sides) for _ in range(rounds)]


def ratio(
    what: str,
    pairs: Sequence[tuple[float, ...]],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
    scale: float = 1.0,
) -> Result:
    """Return the first of each pair divided by the second: the median of the rounds, the lowest and the highest.

    Args:
        unit: of the absolute numbers, after they were multiplied by `scale`.
        at_most: the target, or `at_least`; without either it is only reported.
    """
    ratios = [ours / theirs for ours, theirs in pairs]
    middle = statistics.median(ratios)
    target, is_met = "", None
    if at_most is not None:
        target, is_met = f"at most {at_most:g}x", middle <= at_most
    elif at_least is not None:
        target, is_met = f"at least {at_least:g}x", middle >= at_least
    ours, theirs = (statistics.median(side) * scale for side in zip(*pairs, strict=True))
    return Result(
        what,
        target,
        f"{middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
        is_met,
        f"{_rounded(ours)} against {_rounded(theirs)} {unit}, {len(pairs)} rounds",
    )


def _rounded(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def bound(what: str, values: Sequence[float], *, at_most: float, unit: str) -> Result:
    """Return a measurement that has a bound of its own; the target holds for the highest value."""
    measured = f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"
    return Result(what, f"at most {at_most:g} {unit}", measured, max(values) <= at_most, f"{len(values)} times")


def table(results: Sequence[Result], servers: Sequence[str], load: float) -> str:
    """Return the results as Markdown, with what they were measured on."""
    on = [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs (load {load:.1f} at the start)",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("celery", "sqlalchemy", "psycopg", "redis", "dbos")),
        *servers,
    ]
    lines = [
        f"Measured on {datetime.date.today():%Y-%m-%d}: {', '.join(on)}; PostgreSQL with `fsync`, `synchronous_commit`",
        "and `full_page_writes` on. A ratio is the median of the rounds, with the lowest and the highest in brackets.",
        "",
        "| what | target | measured | met | absolute |",
        "|---|---|---|---|---|",
        *(result.row() for result in results),
    ]
    return "\n".join(lines)


def write(text: str) -> None:
    """Put `text` between the markers of the performance page, or at its end if there are none."""
    page = PAGE.read_text()
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
