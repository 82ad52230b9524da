"""Test that a study compares what its runs measured while they trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.config.study_config import StudyConfig
from trainer.runtime.run_folder import RunFolder
from trainer.studies.cells import Cell
from trainer.studies.comparison import compare
from trainer.studies.page import write_page
from trainer.studies.results import read_results, run_cell

FORGOTTEN = {"frozen": 0.0, "full": 0.25}


def test_a_study_compares_forgetting(tmp_path: Path) -> None:
    config = StudyConfig(
        base=tmp_path / "base.yaml", output=tmp_path, variants={v: {} for v in FORGOTTEN}, baseline="frozen"
    )
    cells = [
        Cell(variant, seed, "trainer.train", (), RunFolder(tmp_path / variant / str(seed)))
        for variant in FORGOTTEN
        for seed in (0, 1)
    ]
    for cell in cells:

        def start(command: Sequence[str], cell: Cell = cell) -> int:
            cell.folder.export.mkdir(parents=True)
            lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "forgetting/difference": None}]
            lines += [{"step": 3, "loss": 1.0, "forgetting/difference": FORGOTTEN[cell.variant] + 0.01 * cell.seed}]
            lines += [{"step": 4, "loss": 1.0}]
            cell.folder.metrics.write_text("\n".join(map(json.dumps, lines)))
            return 0

        assert run_cell(cell, config, start) == 0
    results = read_results(cells)
    comparisons = {(one.variant, one.score): one for one in compare(results, "frozen")}
    difference = comparisons["full", "forgetting/difference"].difference
    assert difference is not None and abs(difference.mean - 0.25) < 1e-9
    write_page(tmp_path / "report.html", config, list(comparisons.values()), results, len(cells))
    assert "forgetting/difference" in (tmp_path / "report.html").read_text()
