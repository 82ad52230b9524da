"""Train over a language model in int8 under ZeRO 1, 2 and 3: one process and two have the same losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.flamingo import Flamingo
from tests.distributed.processes import run_distributed
from tests.distributed.test_trainable_parts import STAGES, losses
from tests.model.builders import tiny_config
from tests.planning.test_plan import CASES, measured_and_planned

INT8 = ["--model.language_model.quantization", "int8"]
TWICE = CASES["stage 3, gathered for the backward again"]


def results(world: Any) -> dict[str, Any]:
    """Train under every stage in the same processes, because starting processes takes most of the time."""
    language_model = replace(tiny_config().language_model, quantization="int8")
    config = replace(tiny_config(), language_model=language_model)
    found: dict[str, Any] = {stage: losses(world, config, stage, look_at_codes) for stage in STAGES}
    if world.size > 1:
        found["sent"] = [measured_and_planned(world, [*TWICE, *more]) for more in ([], INT8)]
    return found


def look_at_codes(model: Flamingo) -> None:
    assert model.language_model.quantization_error is not None
    assert 0 < model.language_model.quantization_error.relative < 0.05
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".codes")} == {torch.int8}


@pytest.mark.distributed
def test_two_processes_train_over_int8_as_one_and_send_what_the_plan_predicts() -> None:
    [one], two = run_distributed(results, 1), run_distributed(results, 2)
    for stage in STAGES:
        assert one[stage][-1] < one[stage][0]
        for found in two:
            assert found[stage] == pytest.approx(one[stage], rel=1e-5), stage
    assert one["2"] == pytest.approx(one["1"], rel=1e-5)
    for found in two:
        [(whole, planned_whole), (quantized, planned)] = found["sent"]
        assert planned == pytest.approx(quantized, rel=0.01)
        assert planned_whole == pytest.approx(whole, rel=0.01)
        assert quantized < 0.9 * whole
