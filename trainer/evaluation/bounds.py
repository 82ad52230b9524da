"""Compare the scores of a report with the bounds of its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config.evaluation_tasks import Bound
from trainer.evaluation.prepared_task import PreparedTask


def check_bounds(tasks: Sequence[PreparedTask], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each bound with the score that it is about, and whether it is met.

    Args:
        tasks: Tasks with their bounds.
        scores: ``tasks`` of the report.
    """
    return [
        row
        for task in tasks
        for bound in task.settings.bounds
        for row in _check(task, bound, scores[task.name]["shots"])
    ]


def _check(task: PreparedTask, bound: Bound, by_shots: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for shots in task.shots if bound.shots is None else (bound.shots,):
        cell = by_shots[str(shots)]
        if bound.control != "none":
            if bound.control not in cell["controls"]:  # controls on demonstrations, at 0 shots
                continue
            cell = cell["controls"][bound.control]
        value = _value(cell, bound)
        met = value is not None
        if value is not None:
            met = (bound.minimum is None or value >= bound.minimum) and (
                bound.maximum is None or value <= bound.maximum
            )
        yield {
            "task": task.name,
            "shots": shots,
            "control": bound.control,
            "score": bound.score,
            "group": bound.group,
            "value": value,
            "minimum": bound.minimum,
            "maximum": bound.maximum,
            "met": met,
        }


def _value(cell: Mapping[str, Any], bound: Bound) -> float | None:
    """Return the score that a bound is about; None if there is none."""
    if bound.score is not None:
        cell = cell.get("scores", {}).get(bound.score, {})
    elif bound.group is not None:
        cell = cell.get("groups", {}).get(bound.group, {})
    value: float | None = cell.get("score")
    return value


def describe(row: Mapping[str, Any]) -> str:
    """Return the name of a bound's score, such as ``vqa, 4 shots, blank, question_type/color``."""
    control = None if row["control"] == "none" else row["control"]
    return ", ".join(
        str(part) for part in (row["task"], f"{row['shots']} shots", control, row["score"], row["group"]) if part
    )
