"""The table, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.benchmarks import growth
from tests.benchmarks.plot import Curve, Curves
from tests.benchmarks.results import Figure, Row
from tests.benchmarks.subjects import Unit

_HEAD = ("work", "floors", "aim", "", "now", "spread", "floor", "fastest rival", "0.6")


def table(rows: Sequence[Row]) -> str:
    """Return one line for each row, aligned."""
    cells = [_HEAD, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    ruled = [cells[0], tuple("-" * max(3, width) for width in widths), *cells[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in ruled
    )


def _cells(row: Row) -> tuple[str, ...]:
    unit = row.line.unit
    rival = "" if row.rival is None else f"{row.rival[0]} {_amount(row.rival[1], unit)}"
    if row.share is not None:
        rival = f"{row.share:.2f} of deepcopy"
    return (
        row.line.work, "" if row.floors is None else f"{row.floors:.1f}",
        "" if row.line.aim is None else str(row.line.aim),
        {None: "", True: "met", False: "**missed**"}[row.met],
        f"{_amount(row.ours, unit)} {unit.name}", f"±{row.ours.spread:.0%}",
        "" if row.floor is None else _amount(row.floor, unit), rival, row.line.published,
    )  # fmt: skip


def _amount(figure: Figure, unit: Unit) -> str:
    return amount(figure.median * unit.per_si)


def amount(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def growth_table(curves: Curves) -> str:
    """Return the figures of the plot, the same without collector, and the memory of a snapshot."""
    columns = [*growth.TIMES, *map(growth.uncollected, growth.TIMES), growth.WEIGHT]
    lines = [f"| keys | {' | '.join(columns)} |", "| ---: " * (1 + len(columns)) + "|"]
    for size in growth.SIZES:
        cells = [amount(curves[column][size]) for column in columns]
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_sentence(curves: Curves) -> str:
    """Return how far the cost of a key strays between 100 and 100,000 keys."""

    def strays(names: Iterable[str]) -> str:
        return ", ".join(f"{_stray(curves[name]):.0%} {name}" for name in names)

    return (
        "From 100 to 100,000 keys the dearest key costs this much more than the cheapest: "
        f"{strays(growth.TIMES)}; {strays(map(growth.uncollected, growth.TIMES))}."
    )


def _stray(curve: Curve) -> float:
    costs = [cost for size, cost in curve.items() if size >= 100]
    return max(costs) / min(costs) - 1
