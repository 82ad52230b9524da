"""Run the cells of a study, and read what each found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.study_config import StudyConfig
from trainer.runtime.files import write_json
from trainer.studies.cells import Cell

LOSS = "loss"
_MOST_POINTS = 200  # of a curve
_MEASURED = ("zero_shot/", "forgetting/")  # metrics that runs measure now and then

Start = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class CellResult:
    """Hold what a run of a study found.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        scores: Scores by their name: "loss", and entries of the evaluation's report.
        curve: (step, loss) at up to 200 steps.
    """

    variant: str
    seed: int
    scores: Mapping[str, float]
    curve: Sequence[tuple[int, float]]


def run_cell(cell: Cell, config: StudyConfig, start: Start | None = None) -> int:
    """Train, export and evaluate a run, or go on where an earlier call stopped; return the first exit code but 0.

    Args:
        cell: The run.
        config: Settings of the study.
        start: Runs a program and returns its exit code; None starts a process.
    """
    if _result_path(cell).is_file():
        return 0
    start = start or _start
    python = [sys.executable, "-m"]
    supervise = ["trainer.supervise", "--module", cell.module, "--processes", str(config.processes), "--"]
    code = start([*python, *supervise, *cell.arguments])
    if code == 0 and not cell.folder.export.is_dir():
        code = start([*python, "trainer.export", str(cell.folder.path)])
    if code == 0 and config.evaluation is not None:
        where = [f"--model={cell.folder.export}", f"--output={cell.evaluation}"]
        code = start([*python, "trainer.evaluate", str(config.evaluation), *where])
    if code == 0:
        write_json(_result_path(cell), asdict(_read_result(cell, config)))
    return code


def read_results(cells: Sequence[Cell]) -> list[CellResult]:
    """Return the results of the cells that are complete."""
    found = [json.loads(_result_path(cell).read_text()) for cell in cells if _result_path(cell).is_file()]
    return [CellResult(**{**one, "curve": [tuple(point) for point in one["curve"]]}) for one in found]


def _start(command: Sequence[str]) -> int:
    return subprocess.run(command, check=False).returncode


def _result_path(cell: Cell) -> Path:
    return cell.folder.path / "study_result.json"


def _read_result(cell: Cell, config: StudyConfig) -> CellResult:
    lines = cell.folder.metrics.read_text(encoding="utf-8").splitlines()
    steps = {line["step"]: float(line["loss"]) for line in map(json.loads, lines) if line.get("loss") is not None}
    points = sorted(steps.items())
    last = [loss for _, loss in points[-config.last_steps :]]
    scores = {LOSS: sum(last) / len(last)}
    # What the run itself measured last, such as the zero-shot tests of towers.
    for line in map(json.loads, lines):
        measured = {name: value for name, value in line.items() if name.startswith(_MEASURED) and value is not None}
        scores |= {name: float(value) for name, value in measured.items()}
    if config.evaluation is not None:
        report = json.loads((cell.evaluation / "report.json").read_text(encoding="utf-8"))
        scores |= _chosen_scores(report, config.scores)
    return CellResult(cell.variant, cell.seed, scores, points[:: max(1, len(points) // _MOST_POINTS)])


def _chosen_scores(report: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return entries of a report by their dotted names.

    Raises:
        ValueError: The report has no such number.
    """
    known = dict(_numbers("", report))
    if not names:
        return {name: value for name, value in known.items() if name.endswith(".score") and ".controls." not in name}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"scores: the report has no number {', '.join(missing)}; it has {', '.join(sorted(known))}")
    return {name: known[name] for name in names}


def _numbers(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [
            found for key, below in value.items() for found in _numbers(f"{prefix}.{key}" if prefix else key, below)
        ]
    return [(prefix, float(value))] if isinstance(value, int | float) and not isinstance(value, bool) else []
