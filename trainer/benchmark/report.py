"""``python -m trainer.benchmark report RESULTS... --html FILE``: write results as one page that needs no network.

Results of one benchmark share a plot only if they come from the same hardware, versions and configuration. Results of
``step`` may differ in the number of processes and in the model. The page plots throughput against the processes, and
memory against the size of the model.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from trainer.benchmark.plots import bars, lines, stacked_bars
from trainer.benchmark.result_file import differing_paths, read_result
from trainer.runtime.files import write_atomically

_SAME = ("hardware", "device", "versions", "data", "config")
_PLOTTED = ("samples per second", "peak memory of a device", "peak memory of a process", "parameters")
_PART = "part: "
_STYLE = (
    "body{font:14px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
)


def main(argv: Sequence[str]) -> int:
    """Write the page and return the exit code, which is 2 for results that cannot be read or compared."""
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark report")
    parser.add_argument("results", type=Path, nargs="+", help="files written by --json of trainer.benchmark")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="page to write")
    options = parser.parse_args(argv)
    try:
        write_atomically(options.html, page(options.results))
    except (ValueError, OSError) as error:
        print(f"trainer.benchmark report: {error}", file=sys.stderr)
        return 2
    return 0


def page(paths: Sequence[Path]) -> str:
    """Return the HTML.

    Raises:
        ValueError: A file is not a result, or results must not share a plot.
    """
    groups: dict[str, list[tuple[Path, Any, list[Any]]]] = defaultdict(list)
    for path in paths:
        head, rows = read_result(path)
        groups[head["benchmark"]].append((path, head, rows))
    sections = []
    for name, results in groups.items():
        _check_comparable(name, results)
        first = results[0][1]
        versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
        plots = _step_plots(results) if name == "step" else "".join(_baseline_plot(rows) for _, _, rows in results)
        tables = "".join(_table(path, head, rows) for path, head, rows in results)
        sections.append(f"<h2>{escape(name)}</h2><p>{escape(first['hardware'])}; {escape(versions)}</p>{plots}{tables}")
    body = "".join(sections)
    return f"<!doctype html><meta charset=utf-8><title>Measurements</title><style>{_STYLE}</style>{body}\n"


def _check_comparable(name: str, results: list[tuple[Path, Any, list[Any]]]) -> None:
    first_path, first, _ = results[0]
    for path, head, _ in results[1:]:
        different = [found for key in _SAME for found in differing_paths(key, head.get(key), first.get(key))]
        if name == "step":
            different = [one for one in different if not f"{one}.".startswith(("config.model.", "config.run_dir."))]
        if different:
            raise ValueError(
                f"{first_path} and {path} are results of {name} with different {', '.join(different)}: "
                "write a page for each"
            )


def _baseline_plot(rows: list[Any]) -> str:
    """Plot how many times better than its baseline each measurement is, with a line at 1."""
    compared = [
        (f"{row['case']}, {row['measure']} / {row['baseline']}", row["ratio"], f"{row['ratio']:.2f} x{_missed(row)}")
        for row in rows
        if row["ratio"] is not None
    ]
    return bars(compared, left=560, line=1.0) if compared else ""


def _missed(row: Any) -> str:
    return f", target {row['target']:.3g} missed" if row["met"] is False else ""


@dataclass(frozen=True)
class _StepResult:
    """Hold the plotted values of one result of ``step``.

    Attributes:
        processes: Number of processes.
        parameters: Parameters of the model.
        speed: Samples per second, over all processes.
        device_memory: Peak memory of a device in MiB.
        process_memory: Peak memory of a process in MiB.
        parts: Seconds of each part of a step.
    """

    processes: int
    parameters: float
    speed: float
    device_memory: float
    process_memory: float
    parts: dict[str, float]

    @property
    def model(self) -> str:
        """Size of the model in words."""
        return f"{self.parameters / 1e6:.4g} M parameters"

    @property
    def devices(self) -> str:
        """Number of processes in words."""
        return f"{self.processes} process" + ("es" if self.processes > 1 else "")


def _step_result(path: Path, head: Any, rows: list[Any]) -> _StepResult:
    values = {row["measure"]: row["value"] for row in rows}
    parts = {name.removeprefix(_PART): value for name, value in values.items() if name.startswith(_PART)}
    missing = [name for name in _PLOTTED if name not in values]
    if "processes" not in head or missing or not parts:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'the processes or the parts'}: measure it again")
    speed, device_memory, process_memory, parameters = (values[name] for name in _PLOTTED)
    return _StepResult(head["processes"], parameters, speed, device_memory, process_memory, parts)


def _step_plots(results: list[tuple[Path, Any, list[Any]]]) -> str:
    """Plot samples per second by processes, the parts of a step, and memory by size of the model."""
    measured: dict[tuple[float, int], _StepResult] = {}
    for path, head, rows in results:
        one = _step_result(path, head, rows)
        if (one.parameters, one.processes) in measured:
            raise ValueError(f"{path}: another result is of {one.model} on {one.devices} too; pass one of them")
        measured[one.parameters, one.processes] = one
    ordered = [measured[key] for key in sorted(measured)]
    plots = ["<h3>Scaling</h3>"]
    for model, same_model in groupby(ordered, lambda one: one.model):
        of_model = list(same_model)
        plots.append(f"<p>{model}</p>" + bars([(one.devices, one.speed, _speed(one, of_model[0])) for one in of_model]))
    parts = {f"{one.model}, {one.devices}": one.parts for one in ordered}
    plots.append("<h3>Parts of a step</h3>" + stacked_bars(parts, left=240))
    plots.append("<h3>Memory against model size</h3>" + _memory_plot(ordered))
    return "".join(plots)


def _speed(one: _StepResult, fewest: _StepResult) -> str:
    """Return the speed, and its share of perfect scaling from the fewest processes."""
    ideal = fewest.speed / fewest.processes * one.processes
    return f"{one.speed:.4g} samples/s" + ("" if one is fewest else f", {100 * one.speed / ideal:.0f} % of ideal")


def _memory_plot(results: list[_StepResult]) -> str:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in results:
        series[f"of a process, {one.devices}"].append((one.parameters, one.process_memory))
        if one.device_memory:
            series[f"of a device, {one.devices}"].append((one.parameters, one.device_memory))
    return lines(series, "parameters", "MiB")


def _table(path: Path, head: Any, rows: list[Any]) -> str:
    return (
        f"<h3>{escape(path.name)}</h3><p>commit {escape(str(head.get('commit')))}</p><table>"
        "<tr><th>case<th>measure<th>value<th>baseline<th>ratio<th>target" + "".join(_table_rows(rows)) + "</table>"
    )


def _table_rows(rows: list[Any]) -> Iterator[str]:
    for row in rows:
        baseline = "" if row["baseline"] is None else f"{row['baseline']}: {row['baseline_value']:.5g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        target = "" if row["target"] is None else f"{row['target']:.3g} ({'met' if row['met'] else 'missed'})"
        cells = (row["case"], row["measure"], f"{row['value']:.5g} {row['unit']}", baseline, ratio, target)
        yield "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)
