"""Reads the examples out of a page, and runs a page's Python as one program: `python -m tests.docs.pages PAGE`.

A ```python block is executed unless the comment `<!-- not executed: reason -->` stands before it. A comment
`<!-- then: code -->` behind a block is executed after it: it checks an example without cluttering the page.
"""

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PART = re.compile(
    r"^```(?P<language>\w+)\n(?P<block>.*?)^```$|^<!-- (?P<word>[\w ]+): (?P<rest>.*?) -->$", re.MULTILINE | re.DOTALL
)

#: An example names the servers of production; here they are in memory and in a file.
_SERVERS = {
    'broker="redis://localhost"': 'broker="memory://"',
    'backend="redis://localhost"': 'backend="cache+memory://"',
    '"postgresql://localhost/shop"': '"sqlite:///shop.db"',
    "sleep(timedelta(days=3))": "sleep(timedelta(seconds=0.05))",
}


@dataclass
class Example:
    """A block of a page."""

    language: str
    text: str
    line: int
    comments: dict[str, str]


def examples(page: Path) -> Iterator[Example]:
    """Yield the blocks of a page; `comments` are those directly before a block."""
    text, comments = page.read_text(), {}
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["word"] == "then":
            yield Example("python", part["rest"] + "\n", line - 1, {})
        elif part["word"]:
            comments[part["word"]] = part["rest"]
        else:
            yield Example(part["language"], part["block"], line, comments)
            comments = {}


def python_of(page: Path) -> list[Example]:
    """Return the blocks of a page that are to be executed."""
    return [e for e in examples(page) if e.language == "python" and "not executed" not in e.comments]


def execute(page: Path) -> None:
    """Execute the Python of a page in one namespace; an app with a store is there, as in every user's project."""
    from celery import Celery

    from celery_durable import Durable

    app = Celery("docs", broker="memory://", backend="cache+memory://", set_as_current=True)
    app.conf.durable_store_url = "sqlite:///docs.db"
    durable = Durable(app)
    durable.migrate()
    _users_own_code()
    main = types.ModuleType("__main__")  # annotations and errors are looked up in the module that holds them
    sys.modules["__main__"] = main
    namespace = vars(main)
    namespace |= {"app": app, "durable": durable}
    for example in python_of(page):
        text = example.text
        for production, here in _SERVERS.items():
            text = text.replace(production, here)
        exec(compile("\n" * example.line + text, str(page), "exec"), namespace)
        if namespace["durable"].app is not app:
            app = namespace["durable"].app
            namespace["durable"].migrate()


def _users_own_code() -> None:
    def charge(order_id: str, cents: int, key: str) -> str:
        return f"charge-{order_id}"

    def pack(order_id: str) -> str:
        return f"parcel-{order_id}"

    def ask_for_review(order_id: str) -> None:
        pass

    services = types.ModuleType("shop_services")
    services.gateway = types.SimpleNamespace(charge=charge)  # type: ignore[attr-defined]
    services.warehouse = types.SimpleNamespace(pack=pack)  # type: ignore[attr-defined]
    services.mail = types.SimpleNamespace(ask_for_review=ask_for_review)  # type: ignore[attr-defined]
    sys.modules["shop_services"] = services


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
