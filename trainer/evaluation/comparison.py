"""``python -m trainer.evaluate compare A B``: compare two evaluations query by query.

The table has a row for each task, number of demonstrations and control that both evaluations have: both scores, their
difference B - A with its interval, and how many queries each of them scores higher. Queries pair by their ids.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.evaluation.metrics import roc_auc
from trainer.evaluation.statistics import Interval, interval, paired_auc_difference, paired_difference
from trainer.runtime.files import write_json

_REPORT, _PREDICTIONS = "report.json", "predictions.jsonl"
_POSITIVE = "yes"
_WIDTH = 150


class _Cell(NamedTuple):
    task: str
    shots: int
    control: str


@dataclass(frozen=True)
class _Evaluation:
    """Hold an evaluation: its folder, the metric of each task, and the lines of each cell by the query's id."""

    folder: Path
    metrics: dict[str, str]
    cells: dict[_Cell, dict[str, Mapping[str, Any]]]


def main(argv: Sequence[str]) -> int:
    """Print the table and return the exit code, which is 2 for evaluations that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="folder of an evaluation, or its report.json")
    parser.add_argument("b", type=Path, metavar="B", help="the same of another one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the comparison to")
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="SHARE", help="level of the intervals (default: 0.95)"
    )
    options = parser.parse_args(argv)
    try:
        rows = list(compare(options.a, options.b, options.confidence))
        if options.json is not None:
            write_json(options.json, rows)
    except (ValueError, OSError) as error:
        print(f"trainer.evaluate compare: {error}", file=sys.stderr)
        return 2
    _print(rows, options.confidence)
    return 0


def compare(a: Path, b: Path, level: float = 0.95) -> Iterator[dict[str, Any]]:
    """Yield a row for each cell of both evaluations: scores, difference B - A with bounds, better and worse queries.

    Args:
        a: Folder of an evaluation, or its ``report.json``.
        b: The same of another one.
        level: Share of such intervals that hold the true difference.

    Raises:
        ValueError: A file is damaged, no cell is in both, or the queries, their right answers or a metric differ.
        OSError: A file cannot be read.
    """
    first, second = _read(a), _read(b)
    shared = [cell for cell in first.cells if cell in second.cells]
    if not shared:
        raise ValueError(
            f"{first.folder} and {second.folder} have no task with the same name, shots and control: "
            f"{_names(first)} beside {_names(second)}"
        )
    for cell in shared:
        yield _compare_cell(cell, first, second, level)


def _compare_cell(cell: _Cell, first: _Evaluation, second: _Evaluation, level: float) -> dict[str, Any]:
    metric, other = first.metrics[cell.task], second.metrics[cell.task]
    if metric != other:
        raise ValueError(f"task {cell.task}: its metric is {metric} in {first.folder}, but {other} in {second.folder}")
    lines_a, lines_b = first.cells[cell], second.cells[cell]
    _check_queries(cell, first, second)
    row: dict[str, Any] = {
        "task": cell.task,
        "shots": cell.shots,
        "control": cell.control,
        "metric": metric,
        "queries": len(lines_a),
    }
    clusters = {name: line["cluster"] for name, line in lines_a.items()}
    try:
        if metric == "roc_auc":
            return row | _compare_aucs(lines_a, lines_b, clusters, level)
        values_a, values_b = (
            {name: line["score"] for name, line in lines.items() if line["score"] is not None}
            for lines in (lines_a, lines_b)
        )
        if not values_a and not values_b:  # the right answers are not known
            return row | {"a": None, "b": None, "difference": None, "low": None, "high": None}
        difference = paired_difference(values_b, values_a, clusters, level)
    except ValueError as error:
        raise ValueError(f"task {cell.task}, {cell.shots} shots, {cell.control}: {error}") from error
    names = list(values_a)
    own = [clusters[name] for name in names]
    return row | {
        "a": interval([values_a[name] for name in names], own, level).mean,
        "b": interval([values_b[name] for name in names], own, level).mean,
        **_bounds(difference),
        "better": sum(values_b[name] > values_a[name] for name in names),
        "worse": sum(values_b[name] < values_a[name] for name in names),
    }


def _compare_aucs(
    lines_a: Mapping[str, Any], lines_b: Mapping[str, Any], clusters: Mapping[str, str], level: float
) -> dict[str, Any]:
    margins_a, margins_b = (
        {name: line["scores"]["margin"] for name, line in lines.items()} for lines in (lines_a, lines_b)
    )
    labels = {name: line["answers"] == [_POSITIVE] for name, line in lines_a.items()}
    difference = paired_auc_difference(margins_b, margins_a, labels, clusters, level)
    score_a, score_b = (
        roc_auc([margins[n] for n in labels], list(labels.values())) for margins in (margins_a, margins_b)
    )
    return {"a": score_a, "b": score_b, **_bounds(difference)}


def _bounds(found: Interval) -> dict[str, float | None]:
    low, high = (None if math.isnan(bound) else bound for bound in (found.low, found.high))
    return {"difference": found.mean, "low": low, "high": high}


def _check_queries(cell: _Cell, first: _Evaluation, second: _Evaluation) -> None:
    """Check that both evaluations answered the same questions.

    Raises:
        ValueError: A query is in one only, or has other right answers.
    """
    lines_a, lines_b = first.cells[cell], second.cells[cell]
    place = f"task {cell.task}, {cell.shots} shots, {cell.control}"
    for one, missing in ((first, lines_a.keys() - lines_b.keys()), (second, lines_b.keys() - lines_a.keys())):
        if missing:
            raise ValueError(
                f"{place}: {len(missing)} queries are in {one.folder} only, such as {min(missing)!r}: compare "
                "evaluations of the same files, num_queries and seed"
            )
    other = [name for name, line in lines_a.items() if line["answers"] != lines_b[name]["answers"]]
    if other:
        raise ValueError(
            f"{place}: {len(other)} queries have other right answers, such as {other[0]!r}: compare the same files"
        )


def _read(path: Path) -> _Evaluation:
    folder = path if path.is_dir() else path.parent
    report = folder / _REPORT if path.is_dir() else path
    try:
        metrics = {
            name: task["metric"] for name, task in json.loads(report.read_text(encoding="utf-8"))["tasks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} is no report of trainer.evaluate: {error!r}") from error
    cells: dict[_Cell, dict[str, Mapping[str, Any]]] = {}
    predictions = folder / _PREDICTIONS
    with open(predictions, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                own = cells.setdefault(_Cell(line["task"], line["shots"], line["control"]), {})
                known = line["id"] in own
                own[line["id"]] = {name: line[name] for name in ("cluster", "answers", "score", "scores")}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{predictions}, line {number}: no prediction of trainer.evaluate: {error!r}"
                ) from error
            if known:
                raise ValueError(f"{predictions}, line {number}: query {line['id']!r} was answered before")
    unknown = {cell.task for cell in cells} - metrics.keys()
    if unknown:
        raise ValueError(f"{report} lacks task {min(unknown)!r} of {predictions}: they are of different evaluations")
    return _Evaluation(folder, metrics, cells)


def _names(evaluation: _Evaluation) -> str:
    names = [f"{cell.task} ({cell.shots} shots, {cell.control})" for cell in evaluation.cells]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"


def _print(rows: Sequence[Mapping[str, Any]], level: float) -> None:
    table = Table(
        "task", "metric", "shots", "control", "queries", "A", "B", "B - A", f"{100 * level:g} %", "better", "worse"
    )
    for row in rows:
        bounds = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        numbers = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("a", "b"))
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        counts = (str(row.get(name, "")) for name in ("better", "worse"))
        head = (row["task"], row["metric"], str(row["shots"]), row["control"], str(row["queries"]))
        table.add_row(*head, *numbers, difference, bounds, *counts)
    Console(width=_WIDTH).print(table)
