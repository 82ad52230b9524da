"""Draw scores over numbers of demonstrations as SVG, with intervals and a line for each control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

_COLORS = ("#1b1b1b", "#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#efb118")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 280, 48, 24, 14, 40

Point = tuple[int, float, float | None, float | None]


def score_plot(series: Mapping[str, Sequence[Point]], label: str) -> str:
    """Return a plot with a legend.

    Args:
        series: Points of each line by its name: shots, score, lower and upper bound (None where there are none).
        label: Name of the score.
    """
    shots = sorted({point[0] for points in series.values() for point in points})
    bounds = [value for points in series.values() for _, *values in points for value in values if value is not None]
    top = max(1e-9, *bounds)
    low = min(0.0, *bounds)

    def at(place: float, value: float) -> tuple[float, float]:
        across = place / max(1, len(shots) - 1) if len(shots) > 1 else 0.5
        inner = _HEIGHT - _TOP - _BOTTOM
        return _LEFT + 12 + across * (_WIDTH - _LEFT - _RIGHT - 24), _TOP + inner * (1 - (value - low) / (top - low))

    parts = [f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#888"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (top - low)
        y = at(0, value)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#eee"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.3g}", "end"))
    parts += [_text(at(n, low)[0], _HEIGHT - _BOTTOM + 16, str(number), "middle") for n, number in enumerate(shots)]
    parts.append(_text(_WIDTH / 2, _HEIGHT - 6, f"{label} by number of demonstrations", "middle"))
    for number, ((name, points), color) in enumerate(zip(series.items(), cycle(_COLORS), strict=False)):
        shift = (number - (len(series) - 1) / 2) * 0.02 * min(1, len(series))  # intervals stand beside each other
        places = [(*at(shots.index(one[0]) + shift, one[1]), one) for one in sorted(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for x, y, (_, score, lower, upper) in places:
            bounds_text = ""
            if lower is not None and upper is not None:
                y_low, y_high = at(0, lower)[1], at(0, upper)[1]
                parts.append(f'<path d="M{x:.1f} {y_low:.1f}V{y_high:.1f}" stroke="{color}" opacity=".6"/>')
                bounds_text = f" ({lower:.3g} to {upper:.3g})"
            title = f"<title>{escape(name)}: {score:.4g}{bounds_text}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}">{title}</circle>')
    legend = " ".join(
        f'<span style="color:{color}">&#9632;</span> {escape(name)}'
        for name, color in zip(series, cycle(_COLORS), strict=False)
    )
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" font-size="12">'
    return f"{head}{''.join(parts)}</svg><div><small>{legend}</small></div>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">{escape(text)}</text>'
