"""Write the page of a study, which needs neither a network nor a script."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path

from trainer.benchmark.plots import COLORS
from trainer.config.study_config import StudyConfig
from trainer.runtime.files import write_atomically
from trainer.studies.comparison import Comparison, Interval
from trainer.studies.results import CellResult

_STYLE = "body{font:14px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:left}"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 300, 60, 30


def write_page(
    path: Path, config: StudyConfig, comparisons: Sequence[Comparison], results: Sequence[CellResult], cells: int
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        config: Settings of the study.
        comparisons: What was compared.
        results: Results of the runs that are complete.
        cells: Runs of the whole study.
    """
    names = dict.fromkeys(one.score for one in comparisons)
    parts = [
        f"<h1>Study of {escape(str(config.base))}</h1>",
        f"<p>{len(results)} of {cells} runs are complete. Intervals are 95 % over seeds.</p>",
        f"<p>Differences to <b>{escape(config.baseline)}</b> are paired by seed. A star: 0 lies outside.</p>",
        _settings_table(config.variants),
        *(f"<h2>{escape(name)}</h2>{_table(one for one in comparisons if one.score == name)}" for name in names),
        "<h2>Loss by step, mean over seeds</h2>",
        _curves(results),
    ]
    title = f"Study of {escape(config.base.stem)}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    write_atomically(path, head + "".join(parts) + "</html>\n")


def _settings_table(variants: Mapping[str, Mapping[str, object]]) -> str:
    rows = [
        f"<tr><td>{escape(name)}</td><td>{escape(', '.join(f'{k} {v}' for k, v in changes.items()) or '-')}</td></tr>"
        for name, changes in variants.items()
    ]
    return f"<table><tr><th>variant</th><th>changed settings</th></tr>{''.join(rows)}</table>"


def _table(comparisons: Iterable[Comparison]) -> str:
    rows = []
    for one in comparisons:
        cells = (one.variant, interval_text(one.value), "" if one.difference is None else interval_text(one.difference))
        star = " *" if one.difference is not None and one.difference.excludes_zero else ""
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + f"<td>{star}</td></tr>")
    return f"<table><tr><th>variant</th><th>mean</th><th>difference</th><th></th></tr>{''.join(rows)}</table>"


def interval_text(interval: Interval) -> str:
    """Return a mean and its interval as text."""
    if interval.seeds == 1:
        return f"{interval.mean:.4f} (1 seed)"
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _curves(results: Sequence[CellResult]) -> str:
    """Draw the mean loss of each variant over its seeds; the y axis begins at the lowest loss."""
    means: dict[str, list[tuple[int, float]]] = {}
    for variant in dict.fromkeys(result.variant for result in results):
        at: dict[int, list[float]] = {}
        for result in results:
            if result.variant == variant:
                for step, loss in result.curve:
                    at.setdefault(step, []).append(loss)
        means[variant] = [(step, statistics.fmean(losses)) for step, losses in sorted(at.items())]
    points = [point for curve in means.values() for point in curve]
    if not points:
        return "<p>No run is complete.</p>"
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)

    def place(step: int, loss: float) -> str:
        x = _LEFT + step / last * (_WIDTH - _LEFT - 10)
        y = 10 + (high - loss) / ((high - low) or 1.0) * (_HEIGHT - _BOTTOM - 10)
        return f"{x:.1f} {y:.1f}"

    drawn = [f'<path d="M{_LEFT} 10V{_HEIGHT - _BOTTOM}H{_WIDTH - 10}" fill="none" stroke="#000"/>']
    drawn += [f'<text x="0" y="{y}">{value:.4g}</text>' for y, value in ((14, high), (_HEIGHT - _BOTTOM, low))]
    drawn += [f'<text x="{_WIDTH - 60}" y="{_HEIGHT - 10}">step {last}</text>']
    legend = []
    for (variant, curve), color in zip(means.items(), cycle(COLORS), strict=False):
        path = "L".join(place(step, loss) for step, loss in curve)
        drawn.append(f'<path d="M{path}" fill="none" stroke="{color}"><title>{escape(variant)}</title></path>')
        legend.append(f'<span style="color:{color}">&#9632;</span> {escape(variant)}')
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="12" font-family="sans-serif">{"".join(drawn)}</svg>'
    return f"<p>{' '.join(legend)}</p>{svg}"
