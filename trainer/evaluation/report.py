"""Write the results of an evaluation: ``report.json``, ``predictions.jsonl`` and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.config.loader import to_plain
from trainer.evaluation.bounds import check_bounds
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.evaluation.scoring import CellScores, score_cell, summarize

_UNITS = {"exact": 1.0, "top1": 1.0, "roc_auc": 1.0, "vqa_accuracy": 100.0, "cider": 100.0}
_WIDTH = 150  # a narrower terminal breaks lines, but a log file shows the whole table
_FORMATS = {1.0: "{:.3f}", 100.0: "{:.1f}"}

Scores = Mapping[Cell, CellScores | None]


def score_all(
    tasks: Sequence[PreparedTask], predictions: Mapping[Cell, Mapping[str, Prediction]]
) -> dict[Cell, CellScores | None]:
    """Score all cells."""
    return {cell: score_cell(task, predictions[cell]) for task in tasks for cell in task.cells}


def build_report(
    tasks: Sequence[PreparedTask], scores: Scores, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``report.json``.

    Args:
        tasks: Tasks of the evaluation.
        scores: Scores of every cell; None where the right answers are not known.
        settings: Settings of the evaluation that the scores depend on.
        model: Description of the model.
    """
    found = {
        task.name: {
            "type": to_plain(task.settings)["type"],
            "metric": task.data.metric,
            "shots": {str(shots): _of_shots(task, shots, scores) for shots in task.shots},
        }
        for task in tasks
    }
    return {"tasks": found, "bounds": check_bounds(tasks, found), "settings": dict(settings), "model": dict(model)}


def _of_shots(task: PreparedTask, shots: int, scores: Scores) -> dict[str, Any]:
    real = scores[Cell(task.name, shots)]
    if real is None:
        return {"score": None, "low": None, "high": None, "queries": len(task.queries), "controls": {}}
    controls = {}
    for cell in task.cells:
        own = scores[cell]
        if cell.shots == shots and cell.control != "none" and own is not None:
            controls[cell.control] = summarize(task, own, real)
    return {**summarize(task, real), "controls": controls}


def prediction_lines(
    tasks: Sequence[PreparedTask], predictions: Mapping[Cell, Mapping[str, Prediction]], scores: Scores
) -> Iterator[dict[str, Any]]:
    """Yield the lines of ``predictions.jsonl``: cell after cell, each query once, in the order of the files."""
    for task in tasks:
        for cell in task.cells:
            for query in task.queries:
                yield {
                    "task": cell.task,
                    "shots": cell.shots,
                    "control": cell.control,
                    "cluster": query.cluster,
                    "answers": list(query.answers),
                    **_prediction_fields(predictions[cell][query.id]),
                    **_score_fields(scores[cell], query.id),
                }


def _prediction_fields(prediction: Prediction) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": prediction.id,
        "answer": prediction.answer,
        "demonstrations": list(prediction.demonstrations),
    }
    if prediction.totals:
        fields |= {"candidates": prediction.totals, "candidates_per_token": prediction.per_token}
    return fields


def _score_fields(scores: CellScores | None, identifier: str) -> dict[str, Any]:
    if scores is None:
        return {"score": None, "scores": {}}
    if not scores.values:
        return {"score": None, "scores": {"margin": scores.margins[identifier]}}
    values = {name: round(own[identifier], 12) for name, own in scores.values.items()}
    return {"score": values.pop(scores.main), "scores": values}


def print_table(report: Mapping[str, Any]) -> None:
    """Print a row for each task and number of demonstrations, with a column for each control."""
    controls = dict.fromkeys(
        name for task in report["tasks"].values() for cell in task["shots"].values() for name in cell["controls"]
    )
    titles = (name.replace("_", "\n") for name in controls)
    level = f"{100 * report['settings']['confidence']:g} %"
    table = Table("task", "metric", "shots", "score", level, "queries", *titles)
    for name, task in report["tasks"].items():
        unit = _UNITS[task["metric"]]
        for shots, cell in task["shots"].items():
            text = _FORMATS[unit].format
            bounds = "" if cell["low"] is None else f"{text(unit * cell['low'])}-{text(unit * cell['high'])}"
            others = (cell["controls"].get(control, {}).get("score") for control in controls)
            shown = ("" if value is None else text(unit * value) for value in (cell["score"], *others))
            score, *columns = shown
            table.add_row(name, task["metric"], shots, score, bounds, str(cell["queries"]), *columns)
    Console(width=_WIDTH).print(table)
