"""Charts as SVG text for pages: no library in the reader's browser, colours from the page, values under the pointer.

Every text is escaped; nothing that a record holds can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 480, 290  # small, so that text is legible on a phone, too
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 44
_ROW, _APART, _SIDE, _NAMED = 26, 9, 130, 18  # of rows: height, between their series, room for names, letters of a name
_MARKS = ("circle", "square", "diamond", "triangle")
_MARKED = 120  # more points than this have no marks, but for those that no line joins
_LIGHT = ("#2166ac", "#c4501b", "#1b7f5c", "#8e3b8e", "#a07800", "#4b5ec9", "#b02a5b", "#5d6b78")
_DARK = ("#6fb1f0", "#ff9b66", "#5fcfa3", "#dd8fdd", "#e0b84a", "#9aa9ff", "#ff85b0", "#a9b6c4")
COLOURS = len(_LIGHT)  # series beyond it take other marks


def _style() -> str:
    def named(colours: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))

    rules = [
        f"svg {{ {named(_LIGHT)} }}",
        f"@media (prefers-color-scheme: dark) {{ svg {{ {named(_DARK)} }} }}",
        "svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .name { fill: var(--ink); }",
        "svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }",
        "svg .zero { stroke: var(--soft); stroke-dasharray: 4 4; }",
        "svg polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }",
        "svg .error { stroke: currentColor; stroke-width: 1.5; }",
        "svg circle, svg rect, svg polygon { fill: currentColor; stroke: var(--card); stroke-width: 1; }",
        *(f"svg .c{i} {{ color: var(--c{i}); }}" for i in range(COLOURS)),
    ]
    return "\n".join(rules)


STYLE = _style()  # of what is drawn here, in a page that says --ink, --soft, --line and --card
_ALONE = """svg { --ink: #1d2127; --soft: #646b76; --line: #dfe3e8; --card: #ffffff; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ee; --soft: #9aa3af; --line: #333a44; --card: #1b1f25; } }
svg > .ground { fill: var(--card); stroke: none; }
"""


def alone(svg: str) -> str:
    """A picture as a file of its own, light or dark as its reader's system is."""
    head, _, rest = svg.partition(">")
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_ALONE}{STYLE}</style>{ground}{rest}\n'


@dataclass(frozen=True)
class Point:
    """`error` above and below y; `label` is what the pointer shows besides both numbers."""

    x: float
    y: float
    error: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points under one name; a line through them if `joined`. Series of one name have one colour and one line in the legend."""

    name: str
    points: tuple[Point, ...]
    joined: bool = True


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    known: Sequence[str] = (),
) -> str:
    """An SVG picture with axes and a legend; empty text where there is nothing to show. `zero` marks y = 0.

    Series called as in `known` have the same colour and mark in every chart that is given the same names.
    """
    series = [replace(s, points=tuple(p for p in s.points if _shown(p, log_x, log_y))) for s in series]
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    scale = _Scale.of([p.x for p in points], log=log_x)
    lows, highs = ([p.y + sign * (p.error or 0) for p in points] for sign in (-1, 1))
    heights = _Scale.of([*(p.y for p in points)] if log_y else [*lows, *highs, *([0.0] if zero else [])], log=log_y)
    names = list(dict.fromkeys(s.name for s in series))
    looks = list(dict.fromkeys([*known, *names]))
    rows = -(-len(names) // 2)
    parts = [_axes(scale, heights, x, y)]
    if zero:
        at = _down(heights, 0.0)
        parts.append(f'<line class="zero" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    marked = len(points) <= _MARKED
    parts += [_series(one, looks.index(one.name), scale, heights, marked) for one in series]
    parts += [_legend(name, i, looks.index(name)) for i, name in enumerate(names)]
    size = HEIGHT + 20 * rows
    body = "".join(parts)
    label = f"{escape(y, quote=True)} by {escape(x, quote=True)}"
    return f'<svg viewBox="0 0 {WIDTH} {size}" role="img" aria-label="{label}">{body}</svg>'


def leads(series: Sequence[Series], rows: Sequence[str], *, x: str) -> str:
    """An SVG picture of named rows: every point stands in the row that its y numbers, its error to both sides, against x = 0."""
    points = [p for s in series for p in s.points if math.isfinite(p.x)]
    if not points:
        return ""
    ends = [p.x + sign * (p.error or 0) for p in points for sign in (-1, 1)]
    scale = _Scale.of([*ends, 0.0], log=False)
    names = list(dict.fromkeys(s.name for s in series))
    there = [
        [s.name for s in series if any(round(p.y) == i and math.isfinite(p.x) for p in s.points)] for i in range(len(rows))
    ]
    tops = [_TOP]
    for found in there:
        tops.append(tops[-1] + _ROW + _APART * max(0, len(found) - 2))
    bottom = tops[-1]
    parts = []
    for i, name in enumerate(rows):
        at = (tops[i] + tops[i + 1]) / 2
        short = name if len(name) <= _NAMED else name[: _NAMED - 1] + "…"
        parts.append(f'<line class="grid" x1="{_SIDE}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_SIDE - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(short)}</text>')
    for tick in scale.ticks:
        text = f'<text x="{_beside(scale, tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_short(tick)}</text>'
        parts.append(text)
    nothing = _beside(scale, 0.0)
    parts.append(f'<line class="zero" x1="{nothing:.1f}" x2="{nothing:.1f}" y1="{_TOP}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{_SIDE}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (WIDTH + _SIDE) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{bottom + 38}" text-anchor="middle">{escape(x)}</text>')
    for one in series:
        index = names.index(one.name)
        parts.append(f'<g class="c{index % COLOURS}">')
        for point in (p for p in one.points if math.isfinite(p.x)):
            row = round(point.y)
            beside = there[row].index(one.name) - (len(there[row]) - 1) / 2  # series of a row stand apart
            a, b = _beside(scale, point.x), (tops[row] + tops[row + 1]) / 2 + _APART * beside
            if point.error:
                left, right = (_beside(scale, point.x + sign * point.error) for sign in (-1, 1))
                parts.append(f'<line class="error" x1="{left:.1f}" x2="{right:.1f}" y1="{b:.1f}" y2="{b:.1f}"/>')
            spread = f" ± {_short(point.error)}" if point.error else ""
            more = f"\n{point.label}" if point.label else ""
            told = escape(f"{one.name}\n{rows[row]}: {_short(point.x)}{spread}{more}")
            parts.append(f"<g><title>{told}</title>{_mark(index, a, b)}</g>")
        parts.append("</g>")
    parts += [_legend(name, i, i, bottom + 56, wide=True) for i, name in enumerate(names)]
    size = bottom + 50 + 20 * len(names)
    label = f"rows by {escape(x, quote=True)}"
    return f'<svg viewBox="0 0 {WIDTH} {size}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _shown(point: Point, log_x: bool, log_y: bool) -> bool:
    there = math.isfinite(point.x) and math.isfinite(point.y)
    return there and (point.x > 0 or not log_x) and (point.y > 0 or not log_y)


def _beside(scale: _Scale, value: float) -> float:
    return _SIDE + scale.share(value) * (WIDTH - _SIDE - _RIGHT)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool) -> _Scale:
        low, high = min(values), max(values)
        if log:
            a, b = math.log10(low), math.log10(high)
            pad = (b - a) * 0.05 or 0.2
            ticks = [m * 10.0**e for e in range(math.floor(a - pad), math.ceil(b + pad) + 1) for m in (1, 2, 5)]
            shown = [t for t in ticks if a - pad <= math.log10(t) <= b + pad]
            return cls(a - pad, b + pad, tuple(shown[:: max(1, len(shown) // 7)]), True)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        first = math.ceil(low / step)
        return cls(low, high, tuple(step * k for k in range(first, math.floor(high / step) + 1)), False)

    def share(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def _across(scale: _Scale, value: float) -> float:
    return _LEFT + scale.share(value) * (WIDTH - _LEFT - _RIGHT)


def _down(scale: _Scale, value: float) -> float:
    return HEIGHT - _BOTTOM - scale.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> str:
    bottom = HEIGHT - _BOTTOM
    out = []
    for tick in up.ticks:
        at = _down(up, tick)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in across.ticks:
        at = _across(across, tick)
        out.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(tick)}</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text class="name" x="{(WIDTH + _LEFT) / 2:.0f}" y="{bottom + 38}" text-anchor="middle">{escape(x)}</text>')
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    out.append(f'<text class="name" x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(y)}</text>')
    return "".join(out)


def _series(one: Series, index: int, across: _Scale, up: _Scale, marked: bool) -> str:
    places = [(_across(across, p.x), _down(up, p.y)) for p in one.points]
    out = [f'<g class="c{index % COLOURS}">']
    if one.joined and len(places) > 1:
        out.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
    if marked or not one.joined:
        for point, (a, b) in zip(one.points, places, strict=True):
            if point.error and not up.log:
                top, low = _down(up, point.y + point.error), _down(up, point.y - point.error)
                out.append(f'<line class="error" x1="{a:.1f}" x2="{a:.1f}" y1="{top:.1f}" y2="{low:.1f}"/>')
            spread = f" ± {_short(point.error)}" if point.error else ""
            more = f"\n{point.label}" if point.label else ""
            told = escape(f"{one.name}\n{_short(point.x)}: {_short(point.y)}{spread}{more}")
            out.append(f"<g><title>{told}</title>{_mark(index, a, b)}</g>")
    return "".join([*out, "</g>"])


def _mark(index: int, a: float, b: float) -> str:
    shape = _MARKS[index // COLOURS % len(_MARKS)]
    if shape == "circle":
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>'
    if shape == "square":
        return f'<rect x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>'
    size = 5.5
    corners = (
        [(0, -size), (size, 0), (0, size), (-size, 0)] if shape == "diamond" else [(0, -size), (size, size), (-size, size)]
    )
    return f'<polygon points="{" ".join(f"{a + dx:.1f},{b + dy:.1f}" for dx, dy in corners)}"/>'


def _legend(name: str, place: int, look: int, top: float = HEIGHT + 12, *, wide: bool = False) -> str:
    """Two a line, or one where names are long."""
    columns, most = (1, 60) if wide else (2, 28)
    a, b = (0 if wide else _LEFT) + 8 + (place % columns) * (WIDTH - _LEFT) / 2, top + 20 * (place // columns)
    short = name if len(name) <= most else name[: most - 1] + "…"
    return f'<g class="c{look % COLOURS}">{_mark(look, a, b - 4)}<text x="{a + 10:.0f}" y="{b}">{escape(short)}</text></g>'


def _short(value: float) -> str:
    size = abs(value)
    for prefix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if unit <= size < 1000 * unit:
            return f"{value / unit:.4g}{prefix}"
    return f"{value:.4g}"
