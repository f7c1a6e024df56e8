"""Two small charts as SVG, and how a picture goes into a markdown artifact.

An artifact shows a picture only as a base64 data URI, as an image of its own: it cannot see the page's
colours.  So it brings its own ground, and a dark one where the reader's system asks for that.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 360
COLOURS = ("a", "b", "c", "d")
STYLE = """\
.ground { fill: #fcfcfb; stroke: #e1e0d9 }
.title { fill: #0b0b0b; font-weight: 600; font-size: 15px; }
.ink { fill: #52514e } .faint { fill: #898781 }
.grid { stroke: #e8e7e2 } .axis { stroke: #b5b3ab }
.a { stroke: #2a78d6 } .b { stroke: #d1451b } .c { stroke: #1b8a5a } .d { stroke: #8250c4 }
.fa { fill: #2a78d6 } .fb { fill: #d1451b } .fc { fill: #1b8a5a } .fd { fill: #8250c4 }
.mark { stroke-width: 1.5; stroke-dasharray: 4 3 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) {
.ground { fill: #1a1a19; stroke: #383835 }
.title { fill: #ffffff } .ink { fill: #c3c2b7 } .faint { fill: #898781 }
.grid { stroke: #2c2c2a } .axis { stroke: #4d4c48 }
.a { stroke: #5598e7 } .b { stroke: #e8764f } .c { stroke: #45b583 } .d { stroke: #a988dc }
.fa { fill: #5598e7 } .fb { fill: #e8764f } .fc { fill: #45b583 } .fd { fill: #a988dc }
}
"""


# Of a line that are drawn; more cannot be told apart, and each is bytes in the server's database.
POINTS = 400


class Mark(NamedTuple):
    """A dashed line across the picture where something happened."""

    name: str
    x: float
    colour: str


class Line(NamedTuple):
    """One curve: its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def markdown(svg: str, alternative: str) -> str:
    """Return the markdown of a picture."""
    return f"![{alternative}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that enclose low..high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Return at most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most // 2 - 1))
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def curve(title: str, x_label: str, y_label: str, lines: Sequence[Line], marks: Sequence[Mark] = ()) -> str:
    """Draw lines over one pair of axes, with ticks, a grid and a legend."""
    finite = [
        Line(line.name, thin([p for p in line.points if all(map(math.isfinite, p))]), line.dots)
        for line in lines
    ]
    points = [point for line in finite for point in line.points]
    if not points:
        return _svg(HEIGHT, title, [_text(WIDTH / 2, HEIGHT / 2, "no points yet", "faint", "middle")])
    width = [x for x, _ in points] + [mark.x for mark in marks]
    xs = ticks(min(width), max(width), 6)
    ys = ticks(min(y for _, y in points), max(y for _, y in points))
    left, right, top, bottom = 64, WIDTH - 24, 76, HEIGHT - 52

    def x_at(x: float) -> float:
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left)

    def y_at(y: float) -> float:
        return bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top)

    parts = []
    for y in ys:
        parts.append(f'<path class="grid" d="M{left} {y_at(y):.1f}H{right}"/>')
        parts.append(_text(left - 8, y_at(y) + 4, _number(y), "faint", "end"))
    for x in xs:
        parts.append(f'<path class="axis" d="M{x_at(x):.1f} {bottom}v5"/>')
        parts.append(_text(x_at(x), bottom + 20, _number(x), "faint", "middle"))
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(_text((left + right) / 2, HEIGHT - 12, x_label, "ink", "middle"))
    turned = f'transform="rotate(-90 18 {(top + bottom) / 2})"'
    parts.append(_text(18, (top + bottom) / 2, y_label, "ink", "middle", turned))
    legend = left
    for colour, line in zip(COLOURS, finite, strict=False):
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in line.points)
        parts.append(f'<path class="line {colour}" d="M{path}"/>')
        if line.dots:
            parts += [
                f'<circle class="f{colour}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>'
                for x, y in line.points
            ]
        parts.append(f'<path class="line {colour}" d="M{legend} 54h18"/>')
        parts.append(_text(legend + 24, 58, line.name, "ink"))
        legend += 48 + 7 * len(line.name)
    for name, colour in dict.fromkeys((mark.name, mark.colour) for mark in marks):
        parts.append(f'<path class="mark {colour}" d="M{legend} 54h18"/>')
        parts.append(_text(legend + 24, 58, name, "ink"))
        legend += 48 + 7 * len(name)
    for x, colour in dict.fromkeys((round(x_at(mark.x), 1), mark.colour) for mark in marks):
        parts.append(f'<path class="mark {colour}" d="M{x} {top}V{bottom}"/>')
    return _svg(HEIGHT, title, parts)


def bars(title: str, values: Mapping[str, float], form: str = "{:.3f}") -> str:
    """Draw one horizontal bar for each value, largest first, with its number at the end."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    left, right, row = 210, WIDTH - 80, 28
    largest = max((value for _, value in ordered), default=0.0) or 1.0
    parts = []
    for index, (name, value) in enumerate(ordered):
        y = 52 + index * row
        length = max(1.0, (right - left) * value / largest)
        shown = name if len(name) <= 28 else name[:27] + "…"
        parts.append(_text(left - 10, y + 14, shown, "ink", "end"))
        parts.append(f'<rect class="fa" x="{left}" y="{y + 2}" width="{length:.1f}" height="16" rx="3"/>')
        parts.append(_text(left + length + 8, y + 14, form.format(value), "ink"))
    return _svg(52 + row * len(ordered) + 16, title, parts)


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}"><style>{STYLE}</style>'
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
        f'<text class="title" x="20" y="30">{escape(title)}</text>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}'.rstrip()
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
