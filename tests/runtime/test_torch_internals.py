"""Test that every private name of torch that the trainer uses is there and does what it did in torch 2.15.0."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.distributed.processes import run_distributed
from trainer.runtime import torch_internals
from trainer.runtime.distributed import World


def timeout_reached(world: World) -> list[str]:
    """Let rank 1 stay away from a collective of each of two groups."""
    other = dist.new_group([0, 1])
    assert set(distributed_c10d._world.pg_map) == {dist.group.WORLD, other}
    torch_internals.set_all_timeouts(datetime.timedelta(milliseconds=300))
    if world.rank == 1:
        time.sleep(2)  # alive, so that rank 0 waits for it
        return []
    errors = []
    for group in (dist.group.WORLD, other):
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=group)
        errors.append(str(caught.value))
    return errors


@pytest.mark.distributed
def test_the_timeout_of_every_group_is_set() -> None:
    """The groups were made with a timeout of 60 seconds."""
    errors, _ = run_distributed(timeout_reached, 2)
    assert len(errors) == 2 and all("300ms" in error for error in errors)


def test_older_versions_of_torch_have_a_private_setter() -> None:
    """Torch 2.15 has both names; once the private one is gone, ``dist.set_timeout`` alone is enough."""
    assert hasattr(dist, "set_timeout") or hasattr(distributed_c10d, "_set_pg_timeout")


def recorded_collectives(world: World) -> str:
    dist.all_reduce(torch.ones(1))
    return torch_internals.flight_recorder_dump()


@pytest.mark.distributed
def test_the_flight_recorder_gives_the_collectives() -> None:
    """tests/distributed/test_resilience.py reads the entries of a run that hangs."""
    assert callable(torch._C._distributed_c10d._dump_fr_trace_json)
    [dumped] = run_distributed(recorded_collectives, 1)
    assert "version" in json.loads(dumped)


def test_the_recorder_of_nccl_has_a_name_of_its_own() -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    assert callable(torch._C._distributed_c10d._dump_nccl_trace_json)


def test_torchs_linear_is_there_while_its_public_name_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    expected = [torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight, bias)]

    def fail(*arguments: Any) -> None:
        raise AssertionError("the replacement was called")

    monkeypatch.setattr(torch.nn.functional, "linear", fail)
    assert torch.equal(torch_internals.torch_linear(x, weight), expected[0])
    assert torch.equal(torch_internals.torch_linear(x, weight, bias=bias), expected[1])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednns_linear_computes_a_product() -> None:
    x_MK, weight_NK, bias_N = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4)
    torch.testing.assert_close(torch_internals.onednn_linear(x_MK, weight_NK, None), x_MK @ weight_NK.t())
    torch.testing.assert_close(torch_internals.onednn_linear(x_MK, weight_NK, bias_N), x_MK @ weight_NK.t() + bias_N)


def replaced_products(world: World) -> tuple[float, bool]:
    """Replace ``aten::mm`` by its negative, and return a product and whether its gradient is negative too."""

    def negative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])).neg_()

    torch_internals.replace_cpu_op("mm", negative)
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)
    product = a @ b
    product.sum().backward()
    assert a.grad is not None
    return float(product[0, 0]), bool((a.grad < 0).all())


@pytest.mark.distributed
def test_an_op_is_replaced_below_autograd() -> None:
    assert run_distributed(replaced_products, 1) == [(-3.0, True)]
