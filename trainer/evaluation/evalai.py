"""Write the result files that EvalAI takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.runtime.files import write_atomically


def results_path(folder: Path, cell: Cell) -> Path:
    """Return the result file of a cell of real prompts."""
    return folder / "evalai" / f"{cell.task}-{cell.shots}-shots.json"


def write_results(folder: Path, task: PreparedTask, cell: Cell, predictions: Mapping[str, Prediction]) -> None:
    """Write the answers of all queries of a task's file; those that ``num_queries`` left out are empty.

    Args:
        folder: Folder of the results.
        task: Task with a layout for EvalAI.
        cell: Cell of real prompts.
        predictions: Prediction of each query by its id.
    """
    answers = dict.fromkeys(task.data.all_ids, "") | {name: one.answer for name, one in predictions.items()}
    path = results_path(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [_entry(task, name, answer) for name, answer in answers.items()]
    write_atomically(path, json.dumps(entries) + "\n")


def _entry(task: PreparedTask, name: str, answer: str) -> dict[str, Any]:
    identifier: int | str = int(name) if name.isdigit() else name
    match task.data.results:
        case "captions":
            return {"image_id": identifier, "caption": answer}
        case "vizwiz":
            return {"image": name, "answer": answer}
        case _:
            return {"question_id": identifier, "answer": answer}
