"""Test on several processes that a step applies the gradient of the global batch, or nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import run_distributed
from trainer.config.run_config import OptimizerConfig
from trainer.deepspeed_engine.engine import Engine, gathered_parameters
from trainer.runtime.distributed import World

OPTIMIZER = OptimizerConfig(lr=0.1, betas=(0.0, 0.0), weight_decay=0.0, clip_grad_norm=1.0)


class SumOfSquares(nn.Module):
    """Compute the loss ``sum over rows of (scale * (x @ w) - y)^2``, where the scale is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 1, bias=False)
        self.frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=(self.frozen(self.weight(x)) - y).square().sum())


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1e9,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }


def problem() -> tuple[SumOfSquares, Tensor, Tensor]:
    torch.manual_seed(0)
    return SumOfSquares(), torch.randn(8, 4), torch.randn(8, 1)


def expected_gradient_norm(scale: float) -> float:
    module, x, y = problem()
    (module(x=x, y=y).loss * scale).backward()
    assert module.weight.weight.grad is not None
    return float(module.weight.weight.grad.norm())


def one_step(world: World, stage: int, poison: bool) -> dict[str, Any]:
    """Do a step of two micro-steps. ``poison`` makes the second loss of the last rank NaN."""
    module, x, y = problem()
    frozen_before = module.frozen.weight.clone()
    weight_before = module.weight.weight.detach().clone()
    engine = Engine(module, OPTIMIZER, settings(stage), world)
    mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    halves = list(zip(x[mine].chunk(2), y[mine].chunk(2), strict=True))
    if poison and world.rank == world.size - 1:
        halves[1][1][0] = float("nan")
    first, last = ({"x": a, "y": b} for a, b in halves)
    losses = [engine.forward_backward(first, scale=1 / 8, is_last=False)]
    losses.append(engine.forward_backward(last, scale=1 / 8, is_last=True))
    result = engine.step(learning_rate_factor=0.5)
    with gathered_parameters(list(module.parameters())):
        moved = (module.weight.weight.detach() - weight_before).abs().max()
        frozen_moved = (module.frozen.weight.detach() - frozen_before).abs().max()
    return {
        "norm": result.grad_norm,
        "applied": result.applied,
        "loss": float(sum(losses)),
        "moved": float(moved),
        "frozen_moved": float(frozen_moved),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_of_the_global_batch(stage: int, world_size: int) -> None:
    results = run_distributed(one_step, world_size, stage, False)
    module, x, y = problem()
    assert sum(result["loss"] for result in results) == pytest.approx(module(x=x, y=y).loss.item(), rel=1e-5)
    for result in results:
        assert result["norm"] == pytest.approx(expected_gradient_norm(1 / 8), rel=1e-5)
        assert result["applied"]
        # With betas 0 Adam moves every weight by the learning rate: 0.1 times the factor 0.5.
        assert result["moved"] == pytest.approx(0.05, rel=1e-3)
        assert result["frozen_moved"] == 0


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_non_finite_loss_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    for result in run_distributed(one_step, 2, stage, True):
        assert not result["applied"]
        assert result["moved"] == 0
