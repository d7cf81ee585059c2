"""Rows of bars over one span of time, as text, as SVG and as a page of HTML.

Laws: whatever the rows say, every bar lies within the span, every line of text within its width;
a picture is bounded in size, since what is alike is put together and the least interesting left
out, which is said; nothing is taken for markup; a picture needs neither a network nor a script.
Colour is never all that tells two things apart: calls are tall bars, waits are flat ones, and what
failed is crossed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from coalestra.core.validation import integer

# How times are written, here and in sentences ----------------------------------------------------


def duration(seconds: float) -> str:
    """Return a length of time in words that suit it: ``0.412 ms``, ``42.1 ms``, ``1.25 s``."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.000_999_5:
        return f"{seconds * 1000:.3f} ms" if seconds >= 0.000_000_5 else "0 ms"
    if seconds < 0.999_95:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    for unit, size, smaller, part in _LONG:
        if seconds < 100 * size or (unit == "d" and seconds < 1e10):
            count, rest = divmod(round(seconds / part), size // part)
            return f"{count} {unit} {rest} {smaller}" if rest else f"{count} {unit}"
    return f"{seconds:.3g} s"


_LONG = (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600))


def many(count: int, noun: str) -> str:
    """Return ``1 key``, ``2 keys``, ``1,000 keys``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# What there is to show ---------------------------------------------------------------------------


class Look(NamedTuple):
    """How bars of one kind look.

    Attributes:
        legend: what they stand for.
        glyph, ascii: what a cell of text is filled with.
        light, dark: their colours; each has a contrast of 3 to its background at the least.
        high: how high they are, in pixels.
        dash: the lengths of their dashes and gaps, in pixels; solid without.
    """

    legend: str
    glyph: str
    ascii: str
    light: str
    dark: str
    high: int = 5
    dash: str = ""


LOOKS = {
    "span": Look("under way", "─", "-", "#7b8895", "#6f7f8f", 2),
    "at_once": Look("there at once", "◆", "*", "#0f766e", "#45cfc0", 14),
    "call": Look("call", "█", "#", "#1f6feb", "#58a6ff", 14),
    "failed": Look("call that failed", "✕", "x", "#c2410c", "#ff8a5c", 14),
    "capacity": Look("wait for capacity", "░", ".", "#a16207", "#e3b341"),
    "pause": Look("pause before a retry", "·", ",", "#7b8895", "#8494a3", 3, "2 3"),
    "flight": Look("wait for another's flight", "═", "~", "#7c3aed", "#b79cff"),
    "dependencies": Look("wait for dependencies", "╌", "=", "#64748b", "#94a3b8", 3, "7 3"),
    "cache": Look("wait for the cache", "▪", "c", "#0f766e", "#45cfc0"),
    "publication": Look("wait for a publication", "▫", "p", "#be185d", "#f472b6"),
    "store": Look("wait to be stored", "▿", "s", "#0e7490", "#4cc9e8"),
}


class Bar(NamedTuple):
    """One stretch of time, of one of the kinds in `LOOKS`, in seconds."""

    kind: str
    start: float
    end: float


class Row(NamedTuple):
    """One line of a picture.

    Attributes:
        label: what it is about.
        note: how it ended, in a few words.
        start, end: from when to when.
        bars: what happened meanwhile; later ones cover earlier ones.
        alike: what it shares with rows that may be told as one.
        severity: how much it deserves to be seen, before its duration counts.
        details: makes the sentences that tell more; None if there are none.
        number: how many it stands for.
    """

    label: str
    note: str
    start: float
    end: float
    bars: tuple[Bar, ...]
    alike: Hashable = None
    severity: int = 0
    details: Callable[[], Iterable[str]] | None = None
    number: int = 1

    @property
    def others(self) -> str:
        """What is said of those that it stands for besides."""
        return f" and {self.number - 1:,} alike" if self.number > 1 else ""

    @property
    def interest(self) -> tuple[int, float]:
        """What rows are chosen by when there are too many."""
        return self.severity, self.end - self.start


class Section(NamedTuple):
    """Rows under one heading.

    Attributes:
        heading: what they are.
        rows: those that are shown.
        omitted: how many more there would have been.
        rest: what is said of those that are not shown.
    """

    heading: str
    rows: Sequence[Row]
    omitted: int = 0
    rest: str = ""

    def fitting(self, limit: int) -> Section:
        """Return it with at most ``limit`` rows, in the order of time.

        Only if there are more are those put together that tell the same story; if these are still
        too many, the worst and then the slowest are kept.
        """
        rows = list(self.rows)
        if len(rows) > limit:
            groups: dict[Hashable, list[Row]] = {}
            for row in rows:
                groups.setdefault(row.alike, []).append(row)
            rows = [_together(group) for group in groups.values()]
            rows = sorted(rows, key=lambda row: row.interest, reverse=True)[:limit]
        left = len(self.rows) - sum(row.number for row in rows)
        told = [f"and {left:,} more, faster and with less to tell"] if left else []
        if self.omitted:
            told.append(f"{self.omitted:,} that there was no room to note")
        rows.sort(key=lambda row: (row.start, row.end))
        return self._replace(rows=rows, rest="; ".join(told))


class Waterfall(NamedTuple):
    """What can be shown as text, SVG or HTML.

    Attributes:
        title: what it is about.
        facts: the most important about it, a few words each.
        seconds: how long it took.
        sections: what happened.
    """

    title: str
    facts: Sequence[str]
    seconds: float
    sections: Sequence[Section]

    def fitting(self, limit: int) -> Waterfall:
        """Return it with at most ``limit`` rows in each section."""
        integer("limit", limit, minimum=1)
        there = [section for section in self.sections if section.rows or section.omitted]
        return self._replace(sections=[section.fitting(limit) for section in there])

    @property
    def legend(self) -> list[tuple[str, Look]]:
        """The kinds of bars that can be seen."""
        seen = {bar.kind for each in self.sections for row in each.rows for bar in row.bars}
        return [(kind, look) for kind, look in LOOKS.items() if kind in seen]


def _together(group: Sequence[Row]) -> Row:
    slowest = max(group, key=lambda row: row.interest)
    if len(group) == 1:
        return slowest
    start, end = min(row.start for row in group), max(row.end for row in group)
    told = slowest.alike, slowest.severity, slowest.details
    bars = (Bar("span", start, end), *slowest.bars)
    return Row(slowest.label, slowest.note, start, end, bars, *told, number=len(group))


def _share(seconds: float, whole: float) -> float:
    """Return which part of the whole a time is, from 0 to 1."""
    return min(max(seconds / whole, 0.0), 1.0) if whole > 0 else 0.0


# As text -----------------------------------------------------------------------------------------


_ZERO_WIDTH = {"Mn", "Me", "Cf"}


def _cells(character: str) -> int:
    if unicodedata.category(character) in _ZERO_WIDTH:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _size(text: str) -> int:
    """Return how many cells of a terminal ``text`` takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _fitted(text: str, room: int, ending: str = "…") -> str:
    """Return ``text``, cut if it takes more cells than there are."""
    if _size(text) <= room:
        return text
    left = room - len(ending)
    for index, character in enumerate(text):
        left -= _cells(character)
        if left < 0:
            return (text[:index] + ending)[: max(room, 0)]
    return text


class Text:
    """Draws with characters, into lines of at most ``width`` cells of a terminal."""

    def __init__(self, width: int, *, ascii_only: bool) -> None:
        self._width = integer("width", width, minimum=40)
        self._ascii = ascii_only

    def drawn(self, picture: Waterfall) -> str:
        """Return the lines of a whole picture, as one text."""
        rows = [row for section in picture.sections for row in section.rows]
        names = [self._plain(row.label) + row.others for row in rows]
        label = min(max(map(_size, names), default=0) + 2, self._width * 2 // 5)
        note = max((_size(self._plain(row.note)) for row in rows), default=0)
        note = min(note, self._width // 4) if self._width >= 72 else 0
        track = self._width - label - 1 - _TIME - (note + 2 if note else 0)
        lines = [*self.wrapped([picture.title], ""), *self.wrapped(picture.facts, " · "), ""]
        lines.append(f"{'':{label}} 0{duration(picture.seconds):>{track - 1}}")
        for section in picture.sections:
            lines.append(section.heading)
            for row in section.rows:
                name = self._fitted(f"  {row.label}", label - len(row.others)) + row.others
                name = self._fitted(name, label) + " " * (label - _size(name))
                took = f"{duration(row.end - row.start):>{_TIME}}"
                bars = self._bars(row, picture.seconds, track)
                lines.append(f"{name} {bars}{took}  {self._fitted(row.note, note)}".rstrip())
            lines += self.wrapped([section.rest] if section.rest else [], "", "  ")
        legend = [f"{self._glyph(look)} {look.legend}" for _, look in picture.legend]
        return "\n".join([*lines, "", *self.wrapped(legend, "   ")]).rstrip() + "\n"

    def _glyph(self, look: Look) -> str:
        return look.ascii if self._ascii else look.glyph

    def _bars(self, row: Row, whole: float, track: int) -> str:
        cells = [" "] * track
        for kind, start, end in row.bars:
            first = min(int(_share(start, whole) * track), track - 1)
            last = max(round(_share(end, whole) * track), first + 1)
            cells[first:last] = self._glyph(LOOKS[kind]) * (last - first)
        return "".join(cells)

    def wrapped(self, parts: Iterable[str], between: str, indent: str = "") -> list[str]:
        """Return the parts in lines, as many on each as there is room for."""
        between = between.replace("·", "-") if self._ascii else between
        lines: list[str] = []
        for part in parts:
            fitted = self._fitted(part, self._width - len(indent))
            if lines and _size(lines[-1] + between + fitted) <= self._width:
                lines[-1] += between + fitted
            else:
                lines.append(indent + fitted)
        return lines

    def _plain(self, text: str) -> str:
        return text.encode("ascii", "backslashreplace").decode() if self._ascii else text

    def _fitted(self, text: str, room: int) -> str:
        return _fitted(self._plain(text), room, "..." if self._ascii else "…")


_TIME = 11
"""How many cells a length of time takes in a row, with the room before it."""


# As SVG and HTML ---------------------------------------------------------------------------------


_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


def _safe(text: str) -> str:
    return text.translate(_ENTITIES)


# Light and dark; text has a contrast of 4.5 to its background at the least.
_COLOURS = {
    "ground": ("#ffffff", "#0f151c"),
    "text": ("#1b2530", "#e6ebf0"),
    "quiet": ("#566373", "#9aa9b8"),
    "grid": ("#dde3e9", "#2a3541"),
    "bad": ("#b93a08", "#ff8a5c"),
}
_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif'


def _style() -> str:
    """Return the colours, for whoever prefers light and for whoever prefers dark."""

    def rules(which: int) -> str:
        ground, text, quiet, grid, bad = (each[which] for each in _COLOURS.values())
        found = [
            f"{{background:{ground};color:{text}}}",
            f" text{{fill:{text}}}",
            f" .ground{{fill:{ground}}}",
            f" .grid{{stroke:{grid}}}",
            f" .quiet{{fill:{quiet};color:{quiet}}}",
            f" .bad{{fill:{bad};color:{bad}}}",
            f" .cross{{fill:{ground}}}",
        ]
        for kind, look in LOOKS.items():
            paint = "stroke" if look.dash else "fill"
            found.append(f" .{kind}{{{paint}:{look[3 + which]}}}")
        return "".join(f".coalestra-trace{rule}" for rule in found)

    return f"{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}"


def _marks(row: Row, whole: float) -> Iterator[str]:
    """Yield the bars of one row: in per cent of whatever they are put into, 20 pixels high."""
    for kind, start, end in row.bars:
        look = LOOKS[kind]
        left = _share(start, whole) * 100
        wide = max(_share(end, whole) * 100 - left, 0.6 if kind == "at_once" else 0.25)
        left = min(left, 100 - wide)
        title = f"<title>{look.legend}: {duration(end - start)}</title>"
        if look.dash:
            yield f'<rect class="ground" x="{left:.2f}%" y="8" width="{wide:.2f}%" height="4"/>'
            yield (
                f'<line class="{kind}" x1="{left:.2f}%" x2="{left + wide:.2f}%" y1="10" y2="10" '
                f'stroke-width="{look.high}" stroke-dasharray="{look.dash}">{title}</line>'
            )
        else:
            yield (
                f'<rect class="{kind}" x="{left:.2f}%" y="{10 - look.high / 2:g}" '
                f'width="{wide:.2f}%" height="{look.high}" rx="{look.high // 7}">{title}</rect>'
            )
        if kind == "failed" and wide > 2.5:
            middle = left + wide / 2
            yield f'<text class="cross" x="{middle:.2f}%" y="14" text-anchor="middle">✕</text>'


def _sample(kind: str) -> str:
    return "".join(_marks(Row("", "", 0, 1, (Bar(kind, 0, 1),)), 1))


def _tone(row: Row) -> str:
    return "bad" if row.severity > 1 else "quiet"


_LINES = "".join(
    f'<line class="grid" x1="{share}%" x2="{share}%" y1="0" y2="100%"/>'
    for share in (0, 25, 50, 75, 100)
)
"""The lines of a grid, in per cent of whatever they are put into."""


def _ticks(whole: float) -> list[tuple[int, str, str]]:
    """Return where on the axis which time stands, and how it is aligned."""
    half, all_of_it = duration(whole / 2), duration(whole)
    return [(0, "0", "start"), (50, half, "middle"), (100, all_of_it, "end")]


_LABEL, _TRACK, _TOOK, _NOTE = 290, 370, 90, 210
_WIDE = _LABEL + _TRACK + _TOOK + _NOTE
_ROW = 24


def svg(picture: Waterfall) -> str:
    """Return a picture that stands alone, or within a page."""
    parts: list[str] = []
    top = 28
    for line in Text(_WIDE // 7, ascii_only=False).wrapped(picture.facts, " · "):
        top += 20
        parts.append(f'<text class="quiet" x="16" y="{top}">{_safe(line)}</text>')
    for section in picture.sections:
        top += 30
        parts.append(f'<text class="head" x="16" y="{top}">{section.heading}</text>')
        top += 10
        parts.append(_svg_grid(picture.seconds, top, _ROW * len(section.rows)))
        for row in section.rows:
            parts.append(_svg_row(row, picture.seconds, top))
            top += _ROW
        if section.rest:
            top += 18
            parts.append(f'<text class="quiet" x="16" y="{top}">{section.rest}</text>')
    top += 26
    for index, (kind, look) in enumerate(picture.legend):
        left, down = 16 + index % 4 * 230, top + index // 4 * 22
        parts.append(
            f'<svg x="{left}" y="{down - 14}" width="28" height="20">{_sample(kind)}</svg>'
            f'<text class="quiet" x="{left + 36}" y="{down}">{look.legend}</text>'
        )
    high = top + 20 + 22 * ((len(picture.legend) - 1) // 4)
    style = (
        f".coalestra-trace text{{font:13px {_FONT}}}.coalestra-trace .head{{font-weight:600}}"
        f".coalestra-trace .title{{font-size:16px;font-weight:600}}"
        f".coalestra-trace .cross{{font-weight:700}}{_style()}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="coalestra-trace" role="img" '
        f'viewBox="0 0 {_WIDE} {high}" width="{_WIDE}" height="{high}" style="max-width:100%">'
        f"<title>{_safe(picture.title)}</title><desc>{_safe(' · '.join(picture.facts))}</desc>"
        f"<style>{style}</style>"
        f'<rect class="ground" width="100%" height="100%" rx="8"/>'
        f'<text class="title" x="16" y="28">{_safe(_fitted(picture.title, _WIDE // 10))}</text>'
        f"{''.join(parts)}</svg>"
    )


def _svg_grid(whole: float, top: int, high: int) -> str:
    times = "".join(
        f'<text class="quiet" x="{_LABEL + _TRACK * share // 100}" y="{top - 8}" '
        f'text-anchor="{anchor}">{text}</text>'
        for share, text, anchor in _ticks(whole)
    )
    return f'{times}<svg x="{_LABEL}" y="{top}" width="{_TRACK}" height="{high}">{_LINES}</svg>'


def _svg_row(row: Row, whole: float, top: int) -> str:
    took = duration(row.end - row.start)
    name = _fitted(row.label, _LABEL // 8 - len(row.others)) + row.others
    return (
        f"<g><title>{_safe(f'{row.label}{row.others}: {took}. {row.note}')}</title>"
        f"{_svg_text(16, top, _LABEL - 26, name)}"
        f'<svg x="{_LABEL}" y="{top + 2}" width="{_TRACK}" height="20">'
        f"{''.join(_marks(row, whole))}</svg>"
        f'<text x="{_LABEL + _TRACK + _TOOK - 14}" y="{top + 17}" text-anchor="end">{took}</text>'
        f"{_svg_text(_WIDE - _NOTE, top, _NOTE, _fitted(row.note, _NOTE // 8), _tone(row))}</g>"
    )


def _svg_text(left: int, top: int, wide: int, text: str, tone: str = "") -> str:
    """Return a line of text; whatever its letters, none is seen outside of its place."""
    return (
        f'<svg x="{left}" y="{top}" width="{wide}" height="{_ROW}">'
        f'<text class="{tone}" y="17">{_safe(text)}</text></svg>'
    )


_PAGE_STYLE = (
    f"body{{margin:0;font:15px/1.45 {_FONT}}}"
    ".coalestra-trace{min-height:100vh;box-sizing:border-box;"
    "padding:1.5rem max(1rem,calc(50% - 36rem))}"
    "h1{font-size:1.35rem;margin:0 0 .4rem;overflow-wrap:anywhere}"
    "h2{font-size:1rem;margin:1.6rem 0 0}"
    "ul,ol{list-style:none;margin:0;padding:0}"
    ".facts,.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}"
    ".legend{margin-top:1.4rem;font-size:.85rem}"
    ".legend li{display:flex;gap:.5rem;align-items:center}"
    ".legend svg{width:28px}"
    "svg{display:block;width:100%;height:20px;overflow:visible}"
    "svg text{font:700 13px system-ui,sans-serif}"
    ".row{display:grid;grid-template-columns:minmax(0,17rem) minmax(0,1fr) 5.5rem minmax(0,14rem);"
    "gap:0 .9rem;align-items:center;padding:.15rem .3rem;border-radius:4px}"
    ".label,.note{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;unicode-bidi:isolate}"
    ".took{text-align:right;font-variant-numeric:tabular-nums}"
    "summary{cursor:pointer;list-style:none}summary::-webkit-details-marker{display:none}"
    "summary .label::before{content:'▸';display:inline-block;width:1.1em}"
    "details[open]>summary .label::before{content:'▾'}"
    "summary:focus-visible{outline:2px solid #1f6feb;outline-offset:1px}"
    "details[open] .label{white-space:normal;overflow-wrap:anywhere}"
    "details p{margin:.4rem 0 .5rem 1.4rem;max-width:48rem;overflow-wrap:anywhere}"
    ".ticks{font-size:.8rem}.times{display:flex;justify-content:space-between}"
    "@media (max-width:46rem){.row{grid-template-columns:minmax(0,1fr) auto;gap:.1rem .8rem}"
    ".row .track{grid-column:1/-1;grid-row:2}.row .note{grid-column:1/-1;grid-row:3}"
    ".row{padding:.4rem .3rem}}"
    "@media (prefers-color-scheme:dark){summary:focus-visible{outline-color:#58a6ff}}"
    "@media (forced-colors:active){rect{forced-color-adjust:none}}"
    "@media print{.coalestra-trace{padding:0}}"
)


def html(picture: Waterfall) -> str:
    """Return a page of its own."""
    facts = "".join(f"<li>{_safe(fact)}</li>" for fact in picture.facts)
    sections = "".join(_html_section(picture.seconds, each) for each in picture.sections)
    legend = "".join(
        f'<li><svg aria-hidden="true">{_sample(kind)}</svg>{look.legend}</li>'
        for kind, look in picture.legend
    )
    title = _safe(picture.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{_PAGE_STYLE}{_style()}</style></head>"
        f'<body><main class="coalestra-trace"><h1>{title}</h1><ul class="facts quiet">{facts}</ul>'
        f'{sections}<ul class="legend quiet" aria-label="Legend">{legend}</ul></main></body>'
        "</html>\n"
    )


def _html_section(whole: float, section: Section) -> str:
    times = "".join(f"<span>{text}</span>" for _, text, _ in _ticks(whole))
    shown = "".join(_html_row(row, whole) for row in section.rows)
    left = f'<p class="quiet">{section.rest}</p>' if section.rest else ""
    return (
        f"<section><h2>{section.heading}</h2>"
        f'<div class="row ticks quiet" aria-hidden="true"><span></span>'
        f'<span class="track times">{times}</span></div><ol>{shown}</ol>{left}</section>'
    )


def _html_row(row: Row, whole: float) -> str:
    line = (
        f'<span class="label">{_safe(row.label)}{row.others}</span> '
        f'<span class="track"><svg aria-hidden="true">{_LINES}{"".join(_marks(row, whole))}'
        f'</svg></span> <span class="took">{duration(row.end - row.start)}</span> '
        f'<span class="note {_tone(row)}">{_safe(row.note)}</span>'
    )
    if row.details is None:
        return f'<li class="row">{line}</li>'
    told = "".join(f"<p>{_safe(each)}</p>" for each in row.details())
    return f'<li><details><summary class="row">{line}</summary>{told}</details></li>'
