"""The plot: cost per key against the number of keys, as an SVG without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.benchmarks import growth
from tests.benchmarks.results import figures_of
from tests.benchmarks.worker import Samples

Curve = dict[int, float]
"""Cost per key by the number of keys."""

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 130, 40, 60


Curves = dict[str, Curve]
"""What a key costs, by the names of what was measured: microseconds, and bytes of a snapshot."""


def curves_of(runs: Mapping[str, Sequence[Samples]]) -> Curves:
    """Collect the medians of all sizes."""
    figures = {size: figures_of(runs[growth.name_of(size)]) for size in growth.SIZES}
    return {
        name: {
            size: found[name].median * (1.0 if name == growth.WEIGHT else 1e6)
            for size, found in figures.items()
        }
        for name in figures[growth.SIZES[0]]
    }


class _Axes:
    """Where a point lies: both axes are logarithmic."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        sizes = [size for curve in curves for size in curve]
        costs = [cost for curve in curves for cost in curve.values()]
        self.decades = range(
            math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs))) + 1
        )
        self._widest = math.log10(max(sizes))

    def x(self, size: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log10(size) / self._widest

    def y(self, cost: float) -> float:
        low, high = self.decades[0], self.decades[-1]
        share = (math.log10(cost) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def svg(curves: Curves) -> str:
    """Return the plot."""
    shown = (
        ("cold", curves[growth.COLD], "#b3402e", ""),
        ("warm", curves[growth.WARM], "#1f5fa8", ""),
        ("plain, cold", curves[growth.PLAIN_COLD], "#b3402e", "5 4"),
        ("plain, warm", curves[growth.PLAIN_WARM], "#1f5fa8", "5 4"),
    )
    axes = _Axes([curve for _, curve, _, _ in shown])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-labelledby="title" font-family="sans-serif" font-size="13" fill="#222">',
        '<title id="title">Cost per key against the number of keys, cold and warm</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 22, "microseconds per key"),
        _text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 14, "keys in a snapshot", "middle"),
        *_grid(axes),
    ]
    for name, curve, colour, dashes in shown:
        parts += _drawn(axes, name, curve, colour, dashes)
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: _Axes) -> list[str]:
    parts = []
    for decade in axes.decades:
        y = axes.y(10.0**decade)
        parts.append(_rule(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 8, y + 4, f"{10.0**decade:g}", "end"))
    for size in growth.SIZES:
        x = axes.x(size)
        parts.append(_rule(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 20, f"{size:,}", "middle"))
    return parts


def _drawn(axes: _Axes, name: str, curve: Curve, colour: str, dashes: str) -> list[str]:
    points = [(axes.x(size), axes.y(cost)) for size, cost in curve.items()]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    x, y = points[-1]
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points),
        _text(x + 10, y + 4, name),
    ]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
