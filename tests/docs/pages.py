"""Markdown pages as the tests read them: Python blocks, what they print, and links.

Marks, each in an HTML comment of its own right above a block:

``<!-- output -->``
    the text block below is what the Python blocks above it, since the last such mark, print;
    ``...`` in it stands for anything.
``<!-- no-run: reason -->``
    the Python block below is only shown.

and one that stands alone:

``<!-- needs: names -->``
    from here to the next such mark the page is a program of its own, which runs after the blocks
    above the first of these marks, and only where modules of these names can be imported.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "output"
NO_RUN = "no-run"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)")
_NEEDS = re.compile(r"^<!-- *needs: *(?P<names>\w+(?:, *\w+)*) *-->$")
_MARK = re.compile(r"^ *<!-- *(?P<mark>output|no-run)(?:: *(?P<reason>.+?))? *-->$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block: where its first line stands, its language, its mark and its text."""

    line: int
    language: str
    mark: str
    reason: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.mark != NO_RUN

    @property
    def is_output(self) -> bool:
        return self.mark == OUTPUT


@dataclass(frozen=True)
class Page:
    """One page, split into its blocks and the lines between them.

    `needs` has the line of each mark of a program of its own, and what that needs.
    """

    path: Path
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)
    needs: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def links(self) -> list[tuple[int, str]]:
        """The line and target of every link outside of blocks."""
        return [
            (line, match["target"]) for line, text in self.prose for match in _LINK.finditer(text)
        ]

    def programs(self) -> list[tuple[tuple[str, ...], Page]]:
        """What each program of the page needs, and the page with the blocks of that alone."""
        if not self.needs:
            return [((), self)]
        starts = [line for line, _ in self.needs]
        first = [block for block in self.blocks if block.line < starts[0]]
        return [
            (names, replace(self, blocks=[*first, *self._between(start, end)]))
            for (start, names), end in zip(self.needs, [*starts[1:], sys.maxsize], strict=True)
        ]

    def _between(self, start: int, end: int) -> list[Block]:
        return [block for block in self.blocks if start < block.line < end]


def page_of(path: Path, text: str) -> Page:
    """Split a page.

    Raises:
        ValueError: for a mark that stands above no fitting block, or a block without an end.
    """
    page = Page(path)
    lines = iter(enumerate(text.splitlines(), start=1))
    mark, reason, marked_at = "", "", 0
    for number, line in lines:
        if needed := _NEEDS.match(line):
            names = needed["names"].replace(" ", "").split(",")
            page.needs.append((number, tuple(name for name in names if name != "nothing")))
        elif found := _MARK.match(line):
            mark, reason, marked_at = found["mark"], found["reason"] or "", number
        elif opening := _FENCE.match(line):
            indent = len(opening["indent"])
            body: list[str] = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner[indent:])
            else:
                raise ValueError(f"{path.name}:{number}: this block has no end")
            block = Block(number + 1, opening["language"], mark, reason, "\n".join(body) + "\n")
            _check_mark(path, block)
            page.blocks.append(block)
            mark = reason = ""
        elif line.strip():
            if mark:
                raise ValueError(
                    f"{path.name}:{marked_at}: the mark {mark!r} has no block below it"
                )
            page.prose.append((number, line))
    return page


def _check_mark(path: Path, block: Block) -> None:
    fits = {"": True, OUTPUT: block.language == "text", NO_RUN: block.language == "python"}
    if not fits[block.mark] or (block.mark == NO_RUN and not block.reason):
        rule = "output marks a text block; no-run marks a python block and gives a reason"
        raise ValueError(f"{path.name}:{block.line}: {rule}")


def pages() -> list[Page]:
    """The README and every page of the documentation."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page_of(path, path.read_text(encoding="utf-8")) for path in paths if path.exists()]
