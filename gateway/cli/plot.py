"""A line chart as SVG, written by hand: one picture does not justify a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 180, 40, 50
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b07aa1", "#9c755f", "#222222")

Lines = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(title: str, across: str, up: str, lines: Lines) -> str:
    """Return an SVG of `lines`, each named and given as points (x, y) by x; y is on a logarithmic scale and must be positive.

    Raises ValueError if there is nothing to draw.
    """
    points = [point for line in lines.values() for point in line]
    if not points or min(y for _, y in points) <= 0:
        raise ValueError("a chart on a logarithmic scale needs positive values")
    axes = _Axes(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(up)}</text>',
        *axes.grid(),
    ]
    for number, (name, line) in enumerate(lines.items()):
        parts.extend(_line(axes, name, line, COLOURS[number % len(COLOURS)], TOP + 18 * number + 6))
    return "\n".join([*parts, "</svg>", ""])


class _Axes:
    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._xs = sorted({x for x, _ in points})
        self._low = math.floor(math.log10(min(y for _, y in points)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(y for _, y in points))))

    def x(self, value: float) -> float:
        span = self._xs[-1] - self._xs[0] or 1.0
        return LEFT + (value - self._xs[0]) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        right = WIDTH - RIGHT
        rows = [(self.y(10.0**power), f"{10.0**power:g}") for power in range(self._low, self._high + 1)]
        parts = [
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
            for y, label in rows
        ]
        parts.extend(
            f'<text x="{self.x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>' for x in self._xs
        )
        return parts


def _line(axes: _Axes, name: str, line: Sequence[tuple[float, float]], colour: str, legend_y: float) -> list[str]:
    places = [(axes.x(x), axes.y(y)) for x, y in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        f'<text x="{WIDTH - RIGHT + 14}" y="{legend_y + 4}" fill="{colour}">{escape(name)}</text>',
    ]
