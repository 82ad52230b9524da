"""Test ``trainer.benchmark soak``: the slope that it judges, and a short run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.project.commands import ROOT
from trainer.benchmark import __main__ as benchmark
from trainer.benchmark.process_samples import ProcessSample
from trainer.benchmark.result_file import Measurement
from trainer.benchmark.soak import Reading, SoakError, growth_rows, median_slope

STEPS = 5000
MIB = 2**20


def rows_of(
    memory: Callable[[int], float], threads: Callable[[int], int] = lambda step: 20
) -> dict[tuple[str, str], Measurement]:
    """Return the growth rows of a run whose memory in MiB and threads are functions of the step."""
    readings = [
        Reading(step, {"ranks": ProcessSample(2, int(memory(step) * MIB), threads(step), 90)})
        for step in range(0, STEPS, 10)
    ]
    return {(row.case, row.measure.split(" ")[0]): row for row in growth_rows(readings, STEPS) if row.unit == "%"}


def test_growth_in_the_warm_up_and_copies_for_checkpoints_do_not_count() -> None:
    def memory(step: int) -> float:
        return min(600, 300 + step) + (200 if step % 500 < 40 else 0)

    rows = rows_of(memory)
    assert rows["ranks", "memory"].value == pytest.approx(100)
    assert all(row.met for row in rows.values())


def test_a_leak_is_measured_in_percent_of_the_level() -> None:
    rows = rows_of(lambda step: 1000 + 0.02 * step, lambda step: 20 + step // 500)
    assert rows["ranks", "memory"].value == pytest.approx(100 + 100 * 20 / 1060, abs=0.01)
    assert rows["ranks", "memory"].met is False
    assert rows["ranks", "threads"].value == pytest.approx(100 + 100 * 2 / 26, rel=0.01)
    assert rows["ranks", "threads"].met is False
    assert rows["ranks", "descriptors"].met


def test_too_few_measurements_are_refused() -> None:
    sample = ProcessSample(2, MIB, 1, 1)
    readings = [Reading(step, {"ranks": sample}) for step in (10, 30, 40, 60, 90)]
    with pytest.raises(SoakError, match="4 measurements after the warm-up .* raise --steps"):
        list(growth_rows(readings, 100))


def test_measurements_of_one_step_have_no_slope() -> None:
    assert median_slope(np.array([3.0, 3.0]), np.array([1.0, 2.0])) == 0


@pytest.mark.distributed
@pytest.mark.long
def test_a_short_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # reads TMPDIR again
    assert benchmark.main(["soak", "--steps", "150", "--json", str(tmp_path / "soak.json")]) == 0
    head, *rows = json.loads((tmp_path / "soak.json").read_text())
    assert (head["benchmark"], head["steps"], head["processes"], head["workers"]) == ("soak", 150, 2, 2)
    values = {(row["case"], row["measure"]): row["value"] for row in rows}
    for kind in ("ranks", "workers"):
        for measure in ("memory", "threads", "descriptors"):
            assert values[kind, measure] > 0
            assert values[kind, f"{measure} after 1,000 more steps"] > 0
    assert not list(tmp_path.glob("soak-*"))
