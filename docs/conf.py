"""Builds the documentation; what the code knows better is read from the code.

The tables of settings, states, moves and errors, the diagram and the list of public names are made at
build time, so none of them can differ from the release that they describe.
"""

import html
import inspect
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import celery_durable  # noqa: E402
from celery_durable import errors, settings, signals, states  # noqa: E402
from celery_durable.states import LIVE, MOVES, RunState  # noqa: E402

project = "celery-durable"
copyright = "the celery-durable authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "changelog.d"]
html_theme = "furo"
html_title = "celery-durable"
html_static_path = ["_static"]
templates_path: list[str] = []
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A hint in a signature names what the package imports, which is not always a documented page.
nitpicky = False


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def comments(module: Any) -> dict[tuple[str, str], str]:
    """Return the `#:` comments of a module by class and name."""
    found = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
    return {key: " ".join(line.strip() for line in lines).strip() for key, lines in found.items()}


def plain(value: Any) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, timedelta):
        days = value / timedelta(days=1)
        return f"`{value.total_seconds():g}`" if days < 1 else f"`timedelta(days={days:g})`"
    return f"`{value!r}`"


def kind(annotation: Any) -> str:
    """Return the type of a setting in words."""
    if annotation is timedelta:
        return "seconds or `timedelta`"
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f'`"{choice}"`' for choice in choices)
    return f"`{getattr(annotation, '__name__', str(annotation))}`" if not choices else f"`{annotation}`"


def settings_table() -> str:
    """Return every setting with its type, its default and its comment."""
    said, rows = comments(settings), []
    for name, field in settings.Settings.model_fields.items():
        text = said.get(("Settings", name))
        if not text:
            raise ExtensionError(f"the setting {name} has no #: comment")
        default = "`RetryPolicy()`" if name == "retry" else plain(field.default)
        rows.append([f"`{settings.PREFIX}{field.alias or name}`", kind(field.annotation), default, text])
    return table(["setting", "type", "default", "meaning"], rows)


def states_table() -> str:
    """Return every state of a run."""
    said, ends = comments(states), states.TERMINAL
    rows = [[f"`{s}`", "ended" if s in ends else "live", said.get(("RunState", s.name), "")] for s in RunState]
    return table(["state", "", "meaning"], rows)


def step_states_table() -> str:
    """Return every state of a record."""
    said = comments(states)
    return table(["state", "meaning"], [[f"`{s}`", said.get(("StepState", s.name), "")] for s in states.StepState])


def moves_table() -> str:
    """Return every move: from where, to where, why."""
    rows = [
        [f"`{name}`", ", ".join(f"`{s}`" for s in RunState if s in move.sources), f"`{move.target}`", move.meaning]
        for name, move in MOVES.items()
    ]
    return table(["move", "from", "to", "because"], rows)


def mermaid() -> str:
    """Return the diagram as Mermaid text."""
    return f"```text\n{states.diagram()}```\n"


def error_classes() -> Iterator[type[Exception]]:
    """Yield the classes of `errors`, the base first."""
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, errors.DurableError):
            yield value


def errors_table() -> str:
    """Return every error with the sentence that describes it."""
    rows = []
    for cls in error_classes():
        where = "`celery_durable`" if cls.__name__ in celery_durable.__all__ else "`celery_durable.errors`"
        again = "yes" if cls.retryable else "no"
        first = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        rows.append([f"`{cls.__name__}`", where, f"`{cls.code}`", again, first])
    return table(["error", "import from", "code", "tried again", "meaning"], rows)


def signals_table() -> str:
    """Return every signal with its arguments."""
    rows = []
    for (_, name), text in comments(signals).items():
        sentence, _, arguments = text.partition(";")
        rows.append([f"`{name}`", arguments.strip().rstrip("."), sentence.strip() + "."])
    return table(["signal", "arguments", "sent when"], rows)


#: Where a class has members that only this package calls: those for users.
_MEMBERS = {"DurableTask": " apply_async, AsyncResult, policy, code_version"}


def api() -> str:
    """Return the autodoc directives of every public name, functions first."""
    public = {name: getattr(celery_durable, name) for name in celery_durable.__all__}
    wanted: list[tuple[str, Callable[[Any], bool], str]] = [
        ("Functions", inspect.isfunction, "autofunction"),
        ("Classes", lambda v: inspect.isclass(v) and not issubclass(v, Exception), "autoclass"),
        ("Errors", lambda v: inspect.isclass(v) and issubclass(v, Exception), "autoexception"),
    ]
    text = ""
    for title, belongs, directive in wanted:
        text += f"## {title}\n\n```{{eval-rst}}\n"
        for name, value in public.items():
            if belongs(value):
                text += f".. {directive}:: celery_durable.{name}\n"
                text += f"   :members:{_MEMBERS.get(name, '')}\n\n" if directive == "autoclass" else "\n"
        text += "```\n\n"
    text += "## What `durable.runs` returns\n\n```{eval-rst}\n"
    text += ".. autoclass:: celery_durable.app.Runs\n   :members:\n\n"
    text += "".join(
        f".. autoclass:: celery_durable.store.queries.{name}\n\n" for name in ("Run", "StepRecord", "HistoryEntry")
    )
    return text + ".. autoclass:: celery_durable.workflow.CurrentRun\n   :members:\n```\n"


# -- the diagram -------------------------------------------------------------------------------------

#: Where each state is drawn: the middle of its box.
_PLACES = {
    RunState.DELAYED: (70, 150),
    RunState.QUEUED: (70, 250),
    RunState.PENDING: (300, 150),
    RunState.RUNNING: (560, 150),
    RunState.WAITING: (340, 310),
    RunState.RETRYING: (560, 310),
    RunState.SUCCEEDED: (900, 60),
    RunState.FAILED: (900, 150),
    RunState.CANCELLED: (900, 230),
    RunState.EXPIRED: (900, 380),
}
#: Moves from many places, drawn as one dashed arrow that names them: where it begins and the label's anchor.
_STUBS = {
    "cancel": (-120, 0, "end"),
    "expire": (-120, 0, "end"),
    "retry": (0, -80, "middle"),
}
_WIDTH, _HEIGHT = 110, 34


def svg() -> str:
    """Return the diagram of states and moves."""
    if missing := {*RunState} - {*_PLACES}:
        raise ExtensionError(f"the diagram has no place for {', '.join(missing)}")
    arrows: dict[tuple[RunState, RunState], list[str]] = {}
    parts = []
    for name, move in MOVES.items():
        if name in _STUBS or any(_is_hidden(source, move.target) for source in move.sources):
            parts.append(_stub(name, move.sources, move.target))
            continue
        for source in move.sources:
            arrows.setdefault((source, move.target), []).append(name)
    parts += [_arrow(*pair, ", ".join(names), bent=pair[::-1] in arrows) for pair, names in sorted(arrows.items())]
    for state, (x, y) in _PLACES.items():
        ended = ' class="ended"' if state in states.TERMINAL else ""
        parts.append(
            f'<rect{ended} x="{x - _WIDTH / 2}" y="{y - _HEIGHT / 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
            f'<text class="state" x="{x}" y="{y + 5}" text-anchor="middle">{html.escape(state)}</text>'
        )
    style = (
        ".moves{width:100%;max-width:970px;font-family:inherit}"
        ".moves rect{fill:var(--color-background-secondary);stroke:var(--color-brand-primary);stroke-width:1.5}"
        ".moves rect.ended{stroke-width:3}.moves text{font-size:13px;fill:var(--color-foreground-secondary);"
        "paint-order:stroke;stroke:var(--color-background-primary);stroke-width:5px}"
        ".moves text.state{font-size:14px;fill:var(--color-foreground-primary);stroke:none}"
        ".moves path{stroke:var(--color-foreground-muted);fill:none;stroke-width:1.2}"
        ".moves marker path{fill:var(--color-foreground-muted)}"
    )
    head = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>'
    )
    return (
        f"<style>{style}</style>"
        '<svg class="moves" viewBox="0 0 970 410" role="img" aria-label="The states of a run and the moves between '
        f'them; the table below lists them all"><defs>{head}</defs>{"".join(parts)}</svg>'
    )


def _arrow(source: RunState, target: RunState, name: str, *, bent: bool) -> str:
    (x1, y1), (x2, y2) = _PLACES[source], _PLACES[target]
    (x1, y1), (x2, y2) = _edge(x1, y1, x2, y2), _edge(x2, y2, x1, y1)
    # Two states with arrows both ways: each arrow bows to its own side.
    length = max(1.0, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
    bow = 34 if bent else 0
    middle_x = (x1 + x2) / 2 - (y2 - y1) / length * bow
    middle_y = (y1 + y2) / 2 + (x2 - x1) / length * bow
    # Nearer to where it begins, because lines cross in the middle.
    label_x = 0.42 * x1 + 0.46 * middle_x + 0.12 * x2
    label_y = 0.42 * y1 + 0.46 * middle_y + 0.12 * y2
    if bent:
        label_x, label_y = middle_x, (y1 + y2 + 3 * middle_y) / 5
    return (
        f'<path d="M{x1:.0f} {y1:.0f} Q{middle_x:.0f} {middle_y:.0f} {x2:.0f} {y2:.0f}" marker-end="url(#tip)"/>'
        f'<text x="{label_x:.0f}" y="{label_y + 4:.0f}" text-anchor="middle">{html.escape(name)}</text>'
    )


def _is_hidden(source: RunState, target: RunState) -> bool:
    """Return whether the line between two boxes would run through a third one."""
    (x1, y1), (x2, y2) = _PLACES[source], _PLACES[target]
    points = [(x1 + (x2 - x1) * n / 50, y1 + (y2 - y1) * n / 50) for n in range(51)]
    others = [place for state, place in _PLACES.items() if state not in (source, target)]
    return any(abs(x - at_x) < _WIDTH / 2 and abs(y - at_y) < _HEIGHT / 2 for x, y in points for at_x, at_y in others)


def _stub(name: str, sources: frozenset[RunState], target: RunState) -> str:
    x, y = _PLACES[target]
    dx, dy, anchor = _STUBS.get(name, (-120, 40, "end"))
    to_x, to_y = _edge(x, y, x + dx, y + dy)
    places = "any live state" if sources == LIVE else ", ".join(s for s in RunState if s in sources)
    return (
        f'<path d="M{x + dx} {y + dy} {to_x:.0f} {to_y:.0f}" marker-end="url(#tip)" stroke-dasharray="5 4"/>'
        f'<text x="{x + dx + (-5 if dx else 0)}" y="{y + dy + (4 if dx else -6)}" text-anchor="{anchor}">'
        f"{html.escape(places)}: {name}</text>"
    )


def _edge(x: float, y: float, to_x: float, to_y: float) -> tuple[float, float]:
    """Return where the line from the middle of a box to another point leaves the box."""
    dx, dy = to_x - x, to_y - y
    scale = min((_WIDTH / 2 + 4) / abs(dx) if dx else float("inf"), (_HEIGHT / 2 + 4) / abs(dy) if dy else float("inf"))
    return x + dx * scale, y + dy * scale


# -- Sphinx ------------------------------------------------------------------------------------------

GENERATED: dict[str, Callable[[], str]] = {
    "api": api,
    "errors": errors_table,
    "mermaid": mermaid,
    "moves": moves_table,
    "settings": settings_table,
    "signals": signals_table,
    "states": states_table,
    "step-states": step_states_table,
}


class Generated(SphinxDirective):
    """Puts in what is made from the code: `{generated} settings`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the parsed text, or the diagram."""
        name = self.arguments[0]
        if name == "diagram":
            return [nodes.raw("", svg(), format="html")]
        return self.parse_text_to_nodes(GENERATED[name](), allow_section_headings=True)


def _literals(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings mark code with single backticks, which reST would print in italics."""
    lines[:] = [line.replace("``", "`").replace("`", "``") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", _literals)
    return {"parallel_read_safe": True}
