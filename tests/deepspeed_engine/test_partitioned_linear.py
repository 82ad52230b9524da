"""The projection under ZeRO-3: torch's gradients, and no input kept for a frozen weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.processes import run_distributed
from trainer.deepspeed_engine.partitioned_linear import partitioned_linear


def gradients_and_kept(linear: Any, frozen: bool, dims: tuple[int, ...], bias: bool) -> tuple[list[Any], list[int]]:
    torch.manual_seed(0)
    x = torch.randn(*dims, 6, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 6), requires_grad=not frozen)
    offset = nn.Parameter(torch.randn(4), requires_grad=not frozen) if bias else None
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == x.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = linear(x, weight, offset)
    output.square().sum().backward()
    return [output, x.grad, weight.grad, None if offset is None else offset.grad], kept


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [(5,), (2, 3)])
@pytest.mark.parametrize("frozen", [False, True])
def test_as_torch_does(frozen: bool, dims: tuple[int, ...], bias: bool) -> None:
    expected, _ = gradients_and_kept(F.linear, frozen, dims, bias)
    found, kept = gradients_and_kept(partitioned_linear, frozen, dims, bias)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    assert bool(kept) != frozen


def linear_in_use(world: Any) -> str:
    from tests.model.builders import tiny_flamingo
    from trainer.config.run_config import OptimizerConfig
    from trainer.deepspeed_engine.engine import Engine

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
    }
    Engine(tiny_flamingo(), OptimizerConfig(), settings, world)
    return F.linear.__module__


@pytest.mark.distributed
def test_an_engine_uses_it() -> None:
    assert run_distributed(linear_in_use, 1) == ["trainer.deepspeed_engine.partitioned_linear"]
