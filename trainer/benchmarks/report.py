"""``python -m trainer.benchmark report RESULTS... --html FILE``: measurements as one page, without a network.

Results of one benchmark share a plot only if they come from the same hardware, versions and configuration; results of
``step`` may differ in the number of processes, which is what their plot shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.files import write_atomically

_SAME = ("hardware", "device", "versions", "data", "config")
_ROW = {"case", "measure", "unit", "value", "rival", "rival_value", "ratio", "target", "met"}
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#9498a0")
_STYLE = (
    "body{font:14px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
)


def main(argv: Sequence[str]) -> int:
    """Write the page; returns 0, or 2 for results that cannot be read or must not be compared."""
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark report")
    parser.add_argument("results", type=Path, nargs="+", help="files that --json wrote")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        write_atomically(options.html, page(options.results))
    except (ValueError, OSError) as error:
        print(f"trainer.benchmark report: {error}", file=sys.stderr)
        return 2
    return 0


def page(paths: Sequence[Path]) -> str:
    """The HTML. Raises ValueError for a file that is no result, or results that must not share a plot."""
    groups: dict[str, list[tuple[Path, Any, list[Any]]]] = defaultdict(list)
    for path in paths:
        head, rows = _read(path)
        groups[head["benchmark"]].append((path, head, rows))
    sections = []
    for name, results in groups.items():
        _check_comparable(name, results)
        first = results[0][1]
        versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
        plots = _step_plots(results) if name == "step" else "".join(_rival_plot(rows) for _, _, rows in results)
        tables = "".join(_table(path, head, rows) for path, head, rows in results)
        sections.append(f"<h2>{escape(name)}</h2><p>{escape(first['hardware'])}; {escape(versions)}</p>{plots}{tables}")
    body = "".join(sections)
    return f"<!doctype html><meta charset=utf-8><title>Measurements</title><style>{_STYLE}</style>{body}\n"


def _read(path: Path) -> tuple[Any, list[Any]]:
    try:
        head, *rows = json.loads(path.read_text(encoding="utf-8"))
        if not {"benchmark", "hardware", "versions"} <= head.keys() or not all(row.keys() >= _ROW for row in rows):
            raise ValueError("keys are missing")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that trainer.benchmark --json wrote") from error
    return head, rows


def _check_comparable(name: str, results: list[tuple[Path, Any, list[Any]]]) -> None:
    first_path, first, _ = results[0]
    for path, head, _ in results[1:]:
        different = [name for key in _SAME for name in _differing(key, head.get(key), first.get(key))]
        if different:
            raise ValueError(
                f"{first_path} and {path} are results of {name} with different {', '.join(different)}: "
                "they do not belong into one plot; write a page for each"
            )


def _differing(path: str, left: Any, right: Any) -> list[str]:
    """Dotted paths of the settings in which two headers differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted(left.keys() | right.keys())
        return [name for key in keys for name in _differing(f"{path}.{key}", left.get(key), right.get(key))]
    return [] if left == right else [path]


def _rival_plot(rows: list[Any]) -> str:
    """How many times better than its rival each measurement is, with 1 as a line."""
    compared = [row for row in rows if row["ratio"] is not None]
    most = max((row["ratio"] for row in compared), default=1.0)
    scale = 300 / max(1.0, most)
    parts = []
    for number, row in enumerate(compared):
        label = f"{row['case']}, {row['measure']} / {row['rival']}"
        colour = _COLOURS[2] if row["met"] is False else _COLOURS[0]
        parts.append(_bar(number, 560, row["ratio"] * scale, colour, label, f"{row['ratio']:.2f} x"))
    line = 560 + scale
    parts.append(f'<line x1="{line}" x2="{line}" y1="0" y2="{22 * len(compared)}" stroke="#000"/>')
    return _svg(parts, len(compared))


def _step_plots(results: list[tuple[Path, Any, list[Any]]]) -> str:
    """Samples a second and the parts of an update, by number of processes."""
    ordered = sorted(results, key=lambda result: result[1]["processes"])
    values = [{row["measure"]: row["value"] for row in rows} for _, _, rows in ordered]
    plots = "<h3>Scaling</h3>" + _bars(ordered, [found["samples per second, all"] for found in values], "samples/s")
    plots += "<h3>Memory</h3>" + _bars(
        ordered, [found["peak memory of a process"] for found in values], "MiB a process"
    )
    names = [name for name in values[0] if name.startswith("part: ")]
    scale = 500 / max(sum(found[name] for name in names) for found in values)
    parts = []
    for number, ((_, head, _), found) in enumerate(zip(ordered, values, strict=True)):
        x = 160.0
        for name, colour in zip(names, _COLOURS, strict=True):
            parts.append(_bar(number, x, found[name] * scale, colour, f"{head['processes']} processes", ""))
            x += found[name] * scale
    legend = " ".join(
        f'<span style="color:{colour}">&#9632;</span> {name.removeprefix("part: ")}'
        for name, colour in zip(names, _COLOURS, strict=True)
    )
    return plots + f"<h3>Parts of an update</h3><p>{legend}</p>" + _svg(parts, len(ordered))


def _bars(results: list[tuple[Path, Any, list[Any]]], values: list[float], unit: str) -> str:
    scale = 400 / max(values)
    labels = [f"{head['processes']} processes" for _, head, _ in results]
    bars = [
        _bar(number, 160, value * scale, _COLOURS[0], label, f"{value:.4g} {unit}")
        for number, (label, value) in enumerate(zip(labels, values, strict=True))
    ]
    return _svg(bars, len(bars))


def _bar(number: int, x: float, width: float, colour: str, label: str, value: str) -> str:
    y = 22 * number
    return (
        f'<text x="0" y="{y + 14}">{escape(label)}</text>'
        f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="16" fill="{colour}"/>'
        f'<text x="{x + width + 6:.1f}" y="{y + 14}">{escape(value)}</text>'
    )


def _svg(parts: list[str], lines: int) -> str:
    return f'<svg width="960" height="{22 * lines + 4}" font-size="12" font-family="sans-serif">{"".join(parts)}</svg>'


def _table(path: Path, head: Any, rows: list[Any]) -> str:
    return (
        f"<h3>{escape(path.name)}</h3><p>commit {escape(str(head.get('commit')))}</p><table>"
        "<tr><th>case<th>measure<th>value<th>rival<th>ratio<th>target" + "".join(_table_rows(rows)) + "</table>"
    )


def _table_rows(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        rival = "" if row["rival"] is None else f"{row['rival']}: {row['rival_value']:.5g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        target = "" if row["target"] is None else f"{row['target']:.3g} ({'met' if row['met'] else 'missed'})"
        cells = (row["case"], row["measure"], f"{row['value']:.5g} {row['unit']}", rival, ratio, target)
        yield "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)
