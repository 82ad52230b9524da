"""Test that the linear function under ZeRO-3 gives torch's gradients and keeps no input of a frozen weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.processes import run_distributed
from trainer.deepspeed_engine.partitioned_linear import partitioned_linear
from trainer.runtime.distributed import World


def run_linear(linear: Any, frozen: bool, dims: tuple[int, ...], bias: bool) -> tuple[list[Tensor | None], bool]:
    """Return the output and all gradients, and whether the input was kept for the backward pass."""
    torch.manual_seed(0)
    x = torch.randn(*dims, 6, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 6), requires_grad=not frozen)
    offset = nn.Parameter(torch.randn(4), requires_grad=not frozen) if bias else None
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr() == x.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = linear(x, weight, offset)
    output.square().sum().backward()
    return [output, x.grad, weight.grad, None if offset is None else offset.grad], any(kept)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [(5,), (2, 3)])
@pytest.mark.parametrize("frozen", [False, True])
def test_output_and_gradients_are_torchs(frozen: bool, dims: tuple[int, ...], bias: bool) -> None:
    expected, _ = run_linear(F.linear, frozen, dims, bias)
    found, input_kept = run_linear(partitioned_linear, frozen, dims, bias)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    assert input_kept != frozen


def linear_in_use(world: World) -> str:
    from tests.model.builders import tiny_flamingo
    from trainer.config.run_config import OptimizerConfig
    from trainer.deepspeed_engine.engine import Engine

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    Engine(tiny_flamingo(), OptimizerConfig(), settings, world)
    return F.linear.__module__


@pytest.mark.distributed
def test_an_engine_with_zero_3_uses_it() -> None:
    assert run_distributed(linear_in_use, 1) == ["trainer.deepspeed_engine.partitioned_linear"]
