"""oneDNN's float32 products are torch's, up to rounding, in forward and backward, and take the place of MKL's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.distributed.processes import run_distributed
from trainer.runtime import cpu_matmul
from trainer.runtime.distributed import World

ROWS, WIDTH, COLUMNS = 160, 128, 192
ONEDNN = "mkldnn::_linear_pointwise"


def test_products_and_gradients_are_onednn_s_up_to_rounding() -> None:
    """In a process of its own: the products are replaced for good."""
    run_distributed(_products_and_gradients, 1)


def test_training_on_the_cpu_uses_them() -> None:
    run_distributed(_engine, 1)


@pytest.mark.parametrize("missing", ["vendor", "instruction set", "library"])
def test_elsewhere_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "vendor":
        monkeypatch.setattr(cpu_matmul.Path, "read_text", lambda self, encoding: "vendor_id : GenuineIntel")
    elif missing == "instruction set":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_matmul.why_not_onednn() is not None
    assert not cpu_matmul.use_onednn.__wrapped__()
    assert _products_of_onednn(lambda: torch.ones(ROWS, WIDTH) @ torch.ones(WIDTH, COLUMNS)) == 0


def _products_and_gradients(world: World) -> None:
    torch.manual_seed(0)
    cpu_matmul.why_not_onednn = lambda: None  # the library is right wherever it runs, and faster only there
    assert cpu_matmul.use_onednn()
    x, weight, bias = torch.randn(4, ROWS // 4, WIDTH), torch.randn(COLUMNS, WIDTH), torch.randn(COLUMNS)
    for biases in (None, bias):
        inputs = [x, weight] if biases is None else [x, weight, biases]
        found = _with_gradients(inputs)
        wanted = _with_gradients([tensor.double() for tensor in inputs])
        assert _products_of_onednn(lambda given=inputs: _with_gradients(given)) == 3  # forward, input, weight
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
    matrix, other = torch.randn(ROWS, WIDTH), torch.randn(ROWS, COLUMNS)
    torch.testing.assert_close(torch.addmm(other, matrix, weight.t()), other + matrix @ weight.t())
    torch.testing.assert_close(
        torch.addmm(other, matrix, weight.t(), beta=0.5, alpha=2), 0.5 * other + 2 * (matrix @ weight.t())
    )
    for narrow in (torch.bfloat16, torch.float64, torch.int64):
        product = matrix.to(narrow) @ weight.t().to(narrow)
        assert product.dtype == narrow
    assert _products_of_onednn(lambda: matrix[:2] @ weight.t()) == 0  # too small to pay
    assert (torch.ones(0, WIDTH) @ weight.t()).shape == (0, COLUMNS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        matrix @ weight


def _engine(world: World) -> None:
    from trainer.config.run_config import OptimizerConfig
    from trainer.deepspeed_engine.engine import Engine

    cpu_matmul.why_not_onednn = lambda: None
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    engine = Engine(nn.Linear(WIDTH, COLUMNS), OptimizerConfig(), settings, world)
    assert _products_of_onednn(lambda: engine.module(torch.randn(ROWS, WIDTH))) == 1


def _with_gradients(inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = F.linear(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def _products_of_onednn(compute: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        compute()
    return sum(event.name == ONEDNN for event in recorded.events())
