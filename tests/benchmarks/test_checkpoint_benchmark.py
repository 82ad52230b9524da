"""Test that the measurements of ``trainer.benchmark checkpoint`` run at a small size; their values are not checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_distributed
from trainer.runtime.distributed import World

pytestmark = pytest.mark.distributed


def measure(world: World, folder: Path) -> list[dict[str, Any]]:
    from trainer.benchmark import checkpoint

    return [row.as_json() for row in checkpoint.measure(folder, world, repeats=1, width=200)]


def test_every_measurement_gives_a_row(tmp_path: Path) -> None:
    [rows] = run_distributed(measure, 1, tmp_path)
    assert [row["target"] for row in rows if row["target"] is not None] == [10.0, 10.0, 1.0]
    assert all(row["value"] > 0 for row in rows)
