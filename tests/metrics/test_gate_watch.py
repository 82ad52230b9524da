"""Test the warning of gates that will hardly open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from model.parameters import no_gather
from trainer.config.run_config import ScheduleConfig
from trainer.deepspeed_engine.optimizer import learning_rate_factor
from trainer.metrics.gate_watch import GateWatch


class Gated(nn.Module):
    """Hold two gates, and a parameter that is none."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.attention_gate, self.feed_forward_gate = (nn.Parameter(torch.tensor([value])) for value in values)
        self.weight = nn.Parameter(torch.ones(3))


def warnings(caplog: pytest.LogCaptureFixture, module: nn.Module, steps: int, schedule: ScheduleConfig) -> list[str]:
    """Return the warnings of a whole run whose gates stay as they are."""
    caplog.clear()
    watch = GateWatch(no_gather, steps, lambda step: learning_rate_factor(step, steps, schedule))
    for done in range(steps):
        watch.look(done, module)
    return [record.getMessage() for record in caplog.records]


def test_gates_that_hardly_move_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings(caplog, Gated(0.003, -0.002), 300, ScheduleConfig(warmup_steps=0))
    assert "after 30 of 300 steps" in message
    assert "tanh 0.003, and will be near 0.03" in message
    assert "optimizer.gate_lr_multiplier" in message


def test_open_gates_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, Gated(0.0, -0.02), 300, ScheduleConfig(warmup_steps=0)) == []


def test_a_long_warmup_gives_no_false_alarm(caplog: pytest.LogCaptureFixture) -> None:
    steps = 1000
    # At the learning rate 5e-5 and with all gradients of one sign.
    moved = 5e-5 * sum(learning_rate_factor(step, steps, ScheduleConfig(warmup_steps=500)) for step in range(100))
    assert warnings(caplog, Gated(moved, 0.0), steps, ScheduleConfig(warmup_steps=500)) != []
    assert warnings(caplog, Gated(2 * moved, 0.0), steps, ScheduleConfig(warmup_steps=500)) == []
    # Without the warm-up, the same movement is half of what the run will reach.
    assert warnings(caplog, Gated(2 * moved, 0.0), steps, ScheduleConfig(warmup_steps=0)) != []


def test_steps_at_a_learning_rate_of_zero_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = GateWatch(no_gather, 100, lambda step: 0.0)
    watch.look(10, Gated(0.0, 0.0))
    assert caplog.records == []


@pytest.mark.parametrize(("module", "steps"), [(nn.Linear(2, 2), 300), (Gated(0.0, 0.0), 99)])
def test_models_without_gates_and_trials_are_not_judged(
    module: nn.Module, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings(caplog, module, steps, ScheduleConfig(warmup_steps=0)) == []


def test_the_gates_alone_are_gathered_and_only_once() -> None:
    module, gathered = Gated(0.0, 0.0), []

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        gathered.append(list(parameters))
        yield

    watch = GateWatch(gather, 100, lambda step: 1.0)
    for done in range(100):
        watch.look(done, module)
    assert [[id(one) for one in group] for group in gathered] == [
        [id(module.attention_gate), id(module.feed_forward_gate)]
    ]
