"""Train every row of the switch of parts under ZeRO 1, 2 and 3: one process and two have the same losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import FlamingoConfig
from model.flamingo import Flamingo
from tests.distributed.processes import run_distributed
from tests.model.builders import BEYOND, tiny_config
from tests.model.test_trainable_parts import ROWS
from tests.model.test_zero3 import share
from trainer.config.run_config import OptimizerConfig

OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
STAGES: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0, **OFFLOADED},
}
ON_DEVICE = {"stage": 3, "stage3_param_persistence_threshold": 0}
STEPS = 4


def all_rows(world: Any) -> dict[str, list[float]]:
    """Train all rows in the same processes, because starting processes takes most of the time."""
    cases = [(row, "3") for row in ROWS] + [("LM too", "1"), ("adapters", "2"), ("tower too", "2")]
    return {
        f"{row}, stage {stage}": losses(world, replace(tiny_config(), trainable=ROWS[row]), stage)
        for row, stage in cases
    }


def losses(
    world: Any,
    config: FlamingoConfig,
    stage: str,
    look: Callable[[Flamingo], None] = lambda model: None,
    replicate_frozen: bool = False,
) -> list[float]:
    """Return the losses of some steps, after ``look`` has seen the model; frozen weights must not change."""
    from model.factory import build_flamingo
    from model.parameters import frozen_digests
    from tests.model.builders import text_with_media
    from trainer.deepspeed_engine.engine import Engine, gathered_parameters, partitioned_loading

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": ON_DEVICE if replicate_frozen else STAGES[stage],
    }
    with partitioned_loading(settings) as build:
        model = build_flamingo(config, BEYOND, gather=build.gather, partition=build.partition, redraw=build.redraw)
    look(model)
    frozen = frozen_digests(model, gathered_parameters)
    engine = Engine(model, OptimizerConfig(lr=1e-3), settings, world, replicate_frozen=replicate_frozen)
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
def test_two_processes_train_as_one_whatever_trains() -> None:
    [one], two = run_distributed(all_rows, 1), run_distributed(all_rows, 2)
    assert two[0] == two[1]
    for case, expected in one.items():
        assert expected[-1] < expected[0], case
        assert two[0][case] == pytest.approx(expected, rel=1e-5), case
