"""Train over a language model in int8 under ZeRO 1, 2 and 3: one process and two have the same losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from tests.distributed.test_trainable_parts import STAGES, STEPS
from tests.model.builders import BEYOND, tiny_config
from tests.model.test_zero3 import share
from tests.planning.test_plan import CASES, measured_and_planned
from trainer.config.run_config import OptimizerConfig

INT8 = ["--model.language_model.quantization", "int8"]
TWICE = CASES["stage 3, gathered for the backward again"]


def quantized_config() -> Any:
    config = tiny_config()
    return replace(config, language_model=replace(config.language_model, quantization="int8"))


def results(world: Any) -> dict[str, Any]:
    """Train under every stage in the same processes, because starting processes takes most of the time."""
    found: dict[str, Any] = {stage: losses(world, stage) for stage in STAGES}
    if world.size > 1:
        found["sent"] = [measured_and_planned(world, [*TWICE, *more]) for more in ([], INT8)]
    return found


def losses(world: Any, stage: str) -> list[float]:
    from model.factory import build_flamingo
    from model.parameters import frozen_digests
    from tests.model.builders import text_with_media
    from trainer.deepspeed_engine.engine import Engine, gathered_parameters, partitioned_loading

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": STAGES[stage],
    }
    with partitioned_loading(settings) as build:
        model = build_flamingo(quantized_config(), BEYOND, gather=build.gather, partition=build.partition)
    frozen = frozen_digests(model, gathered_parameters)
    assert model.language_model.quantization_error is not None
    assert 0 < model.language_model.quantization_error.relative < 0.05
    engine = Engine(model, OptimizerConfig(lr=1e-3), settings, world)
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".codes")} == {torch.int8}
    model.train()
    model.set_activation_checkpointing(2)
    ids, media = text_with_media()
    rows = [share(ids, media, rank) for rank in ((world.rank,) if world.size == 2 else (0, 1))]
    found = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for number, inputs in enumerate(rows):
            total += engine.forward_backward(inputs, 1 / 22, is_last=number == len(rows) - 1)
        assert engine.step(1.0).applied
        torch.distributed.all_reduce(total)
        found.append(float(total))
    assert frozen_digests(model, gathered_parameters) == frozen
    return found


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
