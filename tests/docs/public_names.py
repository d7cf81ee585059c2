"""The tables of docs/public-api.md: each public name with the first sentence of its docstring.

``python -m tests.docs.public_names --write`` renews them. Which name stands in which table, and the
words around the tables, are written by hand.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from tests.architecture.source_tree import modules
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "public-api.md"
PACKAGES = (
    "coalestra", "coalestra.inspect", "coalestra.opentelemetry", "coalestra.prometheus",
    "coalestra.redis",
)  # fmt: skip

_TABLE = re.compile(r"(<!-- names of ([\w.]+): begin -->\n).*?(<!-- names: end -->)", re.DOTALL)
_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """One section of the page: its title, its words, and the names of a package in its table."""

    title: str
    words: str
    package: str
    names: tuple[str, ...]


def sections(page: str) -> list[Section]:
    """The sections with a table, in order."""
    found = []
    for text in page.split("\n## ")[1:]:
        title, _, rest = text.partition("\n")
        if table := _TABLE.search(rest):
            names = tuple(_ROW.findall(table[0]))
            found.append(Section(title, rest[: table.start()].strip(), table[2], names))
    return found


def renewed(page: str) -> str:
    """Return the page with what the docstrings say now."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(found[2], found[0])}\n{found[3]}", page)


def _table(package: str, old: str) -> str:
    rows = [f"| `{name}` | {meaning(package, name)} |" for name in _ROW.findall(old)]
    return "\n".join(["", "| name | what it is |", "| --- | --- |", *rows, ""])


def meaning(package: str, name: str) -> str:
    """The first sentence of what a public name says of itself.

    Raises:
        ValueError: it says nothing.
    """
    found = getattr(importlib.import_module(package), name)
    if inspect.isclass(found) or inspect.isfunction(found):
        said = inspect.getdoc(found) or ""
    else:
        said = _said_of_constants().get(name, "")
    if not said:
        raise ValueError(f"{package}.{name} must have a docstring")
    first = " ".join(said.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", first)[0].replace("``", "`").replace("|", "\\|")


@cache
def _said_of_constants() -> dict[str, str]:
    """The strings right below assignments in the modules of the library, by name."""
    return {
        target.id: inspect.cleandoc(said)
        for module in modules()
        for statement, below in pairwise(module.tree.body)
        for target in _targets(statement)
        if isinstance(target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(said := below.value.value, str)
    }


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--write" in sys.argv:
        PAGE.write_text(renewed(text), encoding="utf-8")
    elif renewed(text) != text:
        sys.exit(f"run python -m {__spec__.name} --write")
