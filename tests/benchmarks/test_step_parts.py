"""The clock of parts: what is counted where, and that nothing is lost or counted twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.processes import run_distributed
from trainer.benchmark.step_parts import GATHER, OUTERMOST, PARTS, REDUCE, PartClock, _TimedBackend, sent_bytes


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 5

    def __call__(self) -> int:
        return self.now


def test_each_moment_belongs_to_the_innermost_part() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    time.now += 1
    with clock.part("backward"):
        time.now += 10
        with clock.part("gather"):
            time.now += 100
        time.now += 1000
    with clock.part("gather"):
        time.now += 10_000
    time.now += 100_000
    assert clock.lap() == {"outside": 100_001, "backward": 1010, "gather": 10_100}
    time.now += 7
    assert clock.lap() == {"outside": 7}


def test_a_part_that_fails_is_closed() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    with pytest.raises(KeyError), clock.part("forward"):
        time.now += 1
        raise KeyError
    time.now += 2
    assert clock.lap() == {"outside": 2, "forward": 1}


class Work:
    """A collective that takes its time when it is waited for."""

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


def test_collectives_and_the_waits_for_them_are_parts_and_their_bytes_are_counted() -> None:
    time = Time()
    clock = PartClock(time, "outside")
    backend = _TimedBackend(Backend(time), clock)
    shard, whole = torch.zeros(3), torch.zeros(12, dtype=torch.float64)
    work = backend.all_gather_into_tensor(whole, input_tensor=shard)
    time.now += 1000  # computing goes on
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
    """The debug model, all of its parameters partitioned."""
    import deepspeed.comm.comm as deepspeed_comm

    from trainer.benchmark import step
    from trainer.benchmark.synthetic import random_model, synthetic_batches
    from trainer.config.run_config import FlamingoRunConfig
    from trainer.data.stream.step_plan import plan_step
    from trainer.deepspeed_engine.engine import Engine

    config: FlamingoRunConfig = step.load_config(
        step.Path("configs/debug.yaml"),
        ["--deepspeed.raw", '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'],
        FlamingoRunConfig,
        check_files=False,
    )
    plans = plan_step(config.data, world.size)
    model, settings = random_model(config, world, sum(plan.micro_batches for plan in plans))
    engine = Engine(model, config.optimizer, settings, world)
    made = [
        batch
        for plan in plans
        for batch in synthetic_batches(plan, model.tokens, model.vision_encoder.image_size, world.rank)
    ]
    before = deepspeed_comm.cdb
    timings = step.measure(engine, iter(lambda: made, None), steps=4, warmup=1, trace=None)
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
        assert parts[OUTERMOST] < sum(parts.values())
        assert parts[GATHER] + parts[REDUCE] < sum(parts.values())
