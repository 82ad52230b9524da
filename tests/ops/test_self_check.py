"""Test the comparison of the kernels with plain torch that precedes their first use on a GPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.ops import dispatch, self_check
from model.ops.self_check import compare, disagreement, fused
from tests.ops.test_cuda_limits import A100, two_cards

__all__ = ["two_cards"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_compared_yet() -> Iterator[None]:
    disagreement.cache_clear()
    yield
    disagreement.cache_clear()


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 1.1 * gradients[0]


def wrong_gradient(number: int, op: str = "cross") -> Callable[..., Tensor]:
    """Return an attention whose gradient of one input is a tenth too large."""
    return lambda *x: getattr(fused(), op)(*x[:number], _ScaledGradient.apply(x[number]), *x[number + 1 :])


def one_wrong_row(*arguments: Tensor) -> Tensor:
    out = fused().resampler(*arguments).clone()
    out[2, 63, 1] = out[2, 62, 1]
    return out


def seen_without_medium(*arguments: Tensor) -> Tensor:
    return fused().cross(*arguments) + (arguments[4] == -1)[:, None, None]


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_kernels_of_this_processor_agree(dtype: torch.dtype, head_dim: int) -> None:
    assert compare(fused(), CPU, dtype, head_dim) is None


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        ("cross", wrong_gradient(0), "cross attention .*: the gradient of q differs from plain torch by 10%"),
        ("cross", wrong_gradient(1), "the gradient of k differs"),
        ("cross", wrong_gradient(2), "the gradient of v differs"),
        ("cross", wrong_gradient(3), "the gradient of gate differs"),
        ("cross", seen_without_medium, "the output differs"),
        ("resampler", one_wrong_row, "resampler attention in torch.bfloat16 with head_dim 64 on cpu: the output"),
        ("resampler", lambda *x: fused().resampler(*x) * float("nan"), "the output is not finite"),
        ("resampler", wrong_gradient(1, "resampler"), "the gradient of k_features differs"),
        ("resampler", wrong_gradient(4, "resampler"), "the gradient of v_latents differs"),
    ],
)
def test_a_wrong_result_is_named(
    op: str, wrong: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = fused()._replace(**{op: wrong})
    monkeypatch.setattr(self_check, "fused", lambda: kernels)
    found = disagreement(CPU, torch.bfloat16, 64)
    assert found is not None
    assert re.search(message, found), found


@pytest.mark.usefixtures("cpu_library")
def test_the_modes_of_the_caller_do_not_matter() -> None:
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), hooks:
        assert disagreement(CPU, torch.float32, 64) is None
    assert not kept


@pytest.mark.usefixtures("two_cards")
def test_a_card_whose_kernels_are_wrong_gets_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared: list[tuple[int | None, torch.dtype, int]] = []

    def wrong_in_float16(kernels: Any, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        compared.append((device.index, dtype, head_dim))
        return "wrong" if dtype == torch.float16 else None

    monkeypatch.setattr(self_check, "compare", wrong_in_float16)
    monkeypatch.setattr(self_check, "disagreement", disagreement)
    with caplog.at_level(logging.WARNING):
        reasons = [dispatch.why_not_fused("cuda", 0, torch.float16, 64) for _ in range(2)]
    assert reasons == ["wrong", "wrong"]
    assert [record.getMessage() for record in caplog.records] == ["wrong: plain torch computes instead of the kernels"]
    assert dispatch.why_not_fused("cuda", 0, torch.bfloat16, 64) is None
    assert compared == [(0, torch.float16, 64), (0, torch.bfloat16, 64)], "each is compared once"
    monkeypatch.setattr(dispatch.library, "cpu_instruction_set", lambda: "generic")
    [row] = [row for row in dispatch.status() if row.backend == "fused on cuda:0" and row.op.startswith("masked")]
    assert not row.available and row.reason == "wrong" and A100.name not in row.reason
