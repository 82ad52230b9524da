"""Test that collectives are timed as parts, that their bytes are counted, and that nothing stays patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_part_clock import Time
from tests.distributed.processes import run_distributed
from trainer.benchmark.part_clock import DATA_WAIT, GATHER, PARTS, REDUCE, PartClock
from trainer.benchmark.timed_parts import TimedBackend, sent_bytes


class Work:
    """A collective that takes time only while a process waits for it."""

    def __init__(self, time: Time) -> None:
        self._time = time

    def wait(self) -> str:
        self._time.now += 100
        return "done"


class Backend:
    def __init__(self, time: Time) -> None:
        self._time = time

    def all_gather_into_tensor(self, output_tensor: Any, input_tensor: Any, group: Any = None) -> Work:
        self._time.now += 1
        return Work(self._time)

    def all_reduce(self, tensor: Any, op: Any = None, group: Any = None) -> None:
        self._time.now += 10

    def get_world_size(self, group: Any = None) -> int:
        return 2 if group == "pair" else 4


def test_collectives_and_waits_are_parts_and_their_bytes_are_counted() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    backend = TimedBackend(Backend(time), clock)
    shard, whole = torch.zeros(3), torch.zeros(12, dtype=torch.float64)
    work = backend.all_gather_into_tensor(whole, input_tensor=shard)
    time.now += 1000  # the computation goes on
    assert work.wait() == "done"
    backend.all_reduce(whole)
    backend.all_reduce(tensor=whole, group="pair")
    assert clock.lap() == {"outside": 1000, "gather": 101, "reduce": 20}
    assert backend.sent == {"gather": 3 * 12, "reduce": 2 * 96 * 3 / 4 + 2 * 96 / 2}
    assert backend.get_world_size() == 4


@pytest.mark.parametrize(
    ("operation", "size", "ranks", "expected"),
    [
        ("all_gather_into_tensor", 10, 4, 30),
        ("reduce_scatter_tensor", 40, 4, 30),
        ("all_reduce", 40, 4, 60),
        ("broadcast", 40, 1, 0),
    ],
)
def test_bytes_of_a_ring(operation: str, size: int, ranks: int, expected: float) -> None:
    assert sent_bytes(operation, size, ranks) == expected


def measured(world: Any) -> tuple[list[dict[str, float]], dict[str, float], bool]:
    """Time the debug model, with all of its parameters partitioned."""
    import deepspeed.comm.comm as deepspeed_comm

    from trainer.benchmark.step_timings import time_steps
    from trainer.benchmark.synthetic_run import random_model, synthetic_step
    from trainer.config.loader import load_config
    from trainer.config.run_config import FlamingoRunConfig
    from trainer.deepspeed_engine.engine import Engine

    config = load_config(
        Path("configs/debug.yaml"),
        ["--deepspeed.raw", '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'],
        FlamingoRunConfig,
        check_files=False,
    )
    model, settings = random_model(config, world)
    engine = Engine(model, config.optimizer, settings, world)
    made = synthetic_step(config, model, world)
    before = deepspeed_comm.cdb
    timings = time_steps(engine, iter(lambda: made, None), steps=4, warmup=1, trace=None)
    return timings.profiled, timings.parts(), deepspeed_comm.cdb is before


@pytest.mark.distributed
def test_the_parts_of_two_processes_add_up_and_nothing_stays_patched() -> None:
    for profiled, parts, restored in run_distributed(measured, 2):
        assert restored
        assert len(profiled) == 4
        assert set(parts) == set(PARTS)
        assert all(parts[name] > 0 for name in PARTS)
        sums = sorted(sum(found.values()) for found in profiled)
        assert sum(parts.values()) == pytest.approx((sums[1] + sums[2]) / 2, rel=1e-9)
        assert parts[DATA_WAIT] < sum(parts.values())
        assert parts[GATHER] + parts[REDUCE] < sum(parts.values())
