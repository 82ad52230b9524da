"""Test the setting ``training.cpu_matmul``, and that oneDNN's products and gradients are torch's up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.distributed.processes import run_distributed
from trainer.errors import ConfigError
from trainer.runtime import cpu_matmul
from trainer.runtime.cpu_matmul import CpuMatmul
from trainer.runtime.distributed import World

M, K, N = 160, 128, 192
ONEDNN_OP = "mkldnn::_linear_pointwise"
MISSING = ["vendor", "instruction set", "mkl", "onednn"]


@pytest.mark.distributed
def test_products_and_gradients_are_torchs_up_to_rounding() -> None:
    """Run in a process of its own, which keeps the replaced products."""
    run_distributed(compare_products_and_gradients, 1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("choice", "faster", "num_onednn"), [("auto", True, 1), ("auto", False, 0), ("torch", True, 0)]
)
def test_the_engine_follows_the_setting(choice: CpuMatmul, faster: bool, num_onednn: int) -> None:
    assert run_distributed(onednn_products_in_an_engine, 1, choice, faster) == [num_onednn]


@pytest.mark.distributed
def test_onednn_is_used_on_request_where_it_is_not_faster() -> None:
    assert run_distributed(onednn_products_in_an_engine, 1, "onednn", False) == [1]


@pytest.mark.parametrize("missing", MISSING)
def test_auto_leaves_torch_alone_where_onednn_is_not_faster(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    take_away(monkeypatch, missing)
    assert cpu_matmul.why_onednn_is_not_faster() is not None
    assert not cpu_matmul.use_cpu_matmul("auto")
    assert count_onednn_products(large_product) == 0


def test_onednn_is_refused_where_torch_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(monkeypatch, "onednn")
    with pytest.raises(ConfigError) as caught:
        cpu_matmul.use_cpu_matmul("onednn")
    [problem] = caught.value.problems
    assert problem.path == "training.cpu_matmul" and '"onednn"' in problem.message
    assert count_onednn_products(large_product) == 0


def test_torch_is_left_alone_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "why_onednn_is_not_faster", lambda: None)
    assert not cpu_matmul.use_cpu_matmul("torch")
    assert count_onednn_products(large_product) == 0


def take_away(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Pretend that all of "auto"'s conditions hold here but one."""
    vendor = "GenuineIntel" if missing == "vendor" else "AuthenticAMD"
    capability = "AVX2" if missing == "instruction set" else "AVX512"
    monkeypatch.setattr(cpu_matmul.Path, "read_text", lambda self, encoding: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: missing != "mkl")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: missing != "onednn")


def compare_products_and_gradients(world: World) -> None:
    torch.manual_seed(0)
    assert cpu_matmul.use_cpu_matmul("onednn")
    x, weight, bias = torch.randn(4, M // 4, K), torch.randn(N, K), torch.randn(N)
    for inputs in ([x, weight], [x, weight, bias]):
        computed = output_and_gradients(inputs)
        exact = output_and_gradients([tensor.double() for tensor in inputs])
        # The products of the output, of the input's gradient and of the weight's gradient.
        assert count_onednn_products(lambda given=inputs: output_and_gradients(given)) == 3
        for one, other in zip(computed, exact, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
    a_MK, added_MN = torch.randn(M, K), torch.randn(M, N)
    torch.testing.assert_close(torch.addmm(added_MN, a_MK, weight.t()), added_MN + a_MK @ weight.t())
    torch.testing.assert_close(
        torch.addmm(added_MN, a_MK, weight.t(), beta=0.5, alpha=2), 0.5 * added_MN + 2 * (a_MK @ weight.t())
    )
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        product = a_MK.to(dtype) @ weight.t().to(dtype)
        assert product.dtype == dtype
    assert count_onednn_products(lambda: a_MK[:2] @ weight.t()) == 0, "too small to gain"
    assert (torch.ones(0, K) @ weight.t()).shape == (0, N)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        a_MK @ weight


def onednn_products_in_an_engine(world: World, choice: CpuMatmul, faster: bool) -> int:
    """Return how many of one product oneDNN computes, where it is faster or not."""
    from trainer.config.run_config import OptimizerConfig
    from trainer.deepspeed_engine.engine import Engine

    cpu_matmul.why_onednn_is_not_faster = lambda: None if faster else "of the test"
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    engine = Engine(nn.Linear(K, N), OptimizerConfig(), settings, world, choice)
    return count_onednn_products(lambda: engine.module(torch.randn(M, K)))


def output_and_gradients(inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = F.linear(*leaves)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def large_product() -> Tensor:
    return torch.ones(M, K) @ torch.ones(K, N)


def count_onednn_products(compute: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        compute()
    return sum(event.name == ONEDNN_OP for event in recorded.events())
