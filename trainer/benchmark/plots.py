"""Draw bars, stacked bars and lines as SVG, for a page that needs neither a network nor a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#9498a0")
_HEIGHT = 22  # pixels of a bar with the space around it
_WIDTH = 960


def bars(values: Sequence[tuple[str, float, str]], left: float = 160, line: float | None = None) -> str:
    """Draw horizontal bars.

    Args:
        values: Label, value and annotation of each bar.
        left: Width of the labels in pixels.
        line: Value to mark with a line across all bars.
    """
    scale = (_WIDTH - left - 300) / max([value for _, value, _ in values] + [line or 0.0, 1e-300])
    parts = [
        _bar(number, left, value * scale, COLORS[0], label, annotation)
        for number, (label, value, annotation) in enumerate(values)
    ]
    if line is not None:
        x = left + line * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT * len(values)}" stroke="#000"/>')
    return _svg(parts, _HEIGHT * len(values) + 4)


def stacked_bars(values: Mapping[str, Mapping[str, float]], left: float = 160) -> str:
    """Draw horizontal bars of parts, under a legend.

    Args:
        values: Value of each part, by label of the bar; all bars have the same parts.
        left: Width of the labels in pixels.
    """
    names = list(next(iter(values.values())))
    scale = (_WIDTH - left - 200) / max(sum(found.values()) for found in values.values())
    parts = []
    for number, (label, found) in enumerate(values.items()):
        x = left
        for name, color in zip(names, cycle(COLORS), strict=False):
            parts.append(_bar(number, x, found[name] * scale, color, label if x == left else "", ""))
            x += found[name] * scale
        parts.append(_text(x + 6, _HEIGHT * number + 14, f"{sum(found.values()):.4g} s"))
    return _legend(names) + _svg(parts, _HEIGHT * len(values) + 4)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Draw lines through points, with a logarithmic x axis and a y axis from 0.

    Args:
        series: Points (x, y) of each line, by name.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
    """
    width, height, left, bottom = 640, 260, 70, 40
    xs = [x for points in series.values() for x, _ in points]
    low, high = math.log(min(xs)), math.log(max(xs))
    top = 1.1 * max(y for points in series.values() for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low) / (high - low) if high > low else 0.5
        return left + 30 + across * (width - left - 60), height - bottom - y / top * (height - bottom - 10)

    parts = [
        f'<path d="M{left} 0V{height - bottom}H{width}" fill="none" stroke="#000"/>',
        _text(left, height - 4, x_label),
        _text(0, 12, y_label),
    ]
    parts += [_text(at(x, 0)[0] - 20, height - bottom + 16, _short(x)) for x in sorted(set(xs))]
    parts += [_text(10, at(xs[0], share * top)[1] + 4, _short(share * top)) for share in (0.25, 0.5, 0.75)]
    for (name, points), color in zip(series.items(), cycle(COLORS), strict=False):
        places = [at(x, y) for x, y in sorted(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}"><title>{escape(name)}</title></path>')
        for (x, y), (_, value) in zip(places, sorted(points), strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{value:.5g}</title></circle>')
    return _legend(series) + _svg(parts, height)


def _bar(number: int, x: float, width: float, color: str, label: str, annotation: str) -> str:
    y = _HEIGHT * number
    box = f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_HEIGHT - 6}" fill="{color}"/>'
    return _text(0, y + 14, label) + box + _text(x + width + 6, y + 14, annotation)


def _legend(names: Iterable[str]) -> str:
    colored = zip(names, cycle(COLORS), strict=False)
    return "<p>" + " ".join(f'<span style="color:{c}">&#9632;</span> {escape(name)}' for name, c in colored) + "</p>"


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _svg(parts: Iterable[str], height: float) -> str:
    head = f'<svg width="{_WIDTH}" height="{height:.0f}" font-size="12" font-family="sans-serif">'
    return head + "".join(parts) + "</svg>"
