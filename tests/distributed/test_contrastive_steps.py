"""A contrastive step over micro-batches, ranks and stages of ZeRO equals one full batch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.contrastive_steps import StepCase, engine_steps, full_batch_step, write_towers
from tests.distributed.processes import run_distributed
from trainer.config.contrastive_config import ContrastiveLossConfig

pytestmark = pytest.mark.distributed


def check(result: dict[str, Any], expected: dict[str, Any], case: StepCase) -> None:
    assert result["applied"], case
    assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5), case
    for name, weight in expected["weights"].items():
        assert result["weights"][name] == pytest.approx(weight, abs=1e-6), (case, name)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_step_equals_that_of_one_full_batch(tmp_path: Path, world_size: int) -> None:
    architecture = write_towers(tmp_path)
    counts = {1: [1, 8], 2: [1, 2, 4]}[world_size]
    cases = [StepCase(stage, count) for stage in (1, 2, 3) for count in counts]
    sigmoid = ContrastiveLossConfig(kind="sigmoid", rows_per_chunk=5)
    cases += [StepCase(2, 2, merged=True), StepCase(2, 4, clip=False), StepCase(3, 2, clip=False, loss=sigmoid)]
    ranks = run_distributed(engine_steps, world_size, str(architecture), cases)
    references = {}
    for number, case in enumerate(cases):
        key = (case.merged, case.clip, case.loss.kind)
        if key not in references:
            references[key] = full_batch_step(architecture, case)
        expected = references[key]
        check(ranks[0][number], expected, case)
        for name, loss in expected["losses"].items():
            assert sum(rank[number]["losses"][name] for rank in ranks) == pytest.approx(loss, rel=1e-5), case
