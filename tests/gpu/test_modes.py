"""Check the CUDA kernels under streams, other devices, graphs, compilation, autocast and recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model import ops
from model.ops import cuda_limits
from tests.ops.cases import (
    PACKED,
    CrossCase,
    check_fused,
    cross_case,
    expect,
    resampler_case,
    run_cross,
    run_resampler,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def bfloat16_case(device: str = "cuda", **options: Any) -> CrossCase:
    return cross_case(PACKED, num_media=8, dtype=torch.bfloat16, device=device, **options)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    expected = run_cross(ops.masked_cross_attention, bfloat16_case("cuda:0"), backend="fused")
    found = run_cross(ops.masked_cross_attention, bfloat16_case("cuda:1"), backend="fused")
    assert torch.cuda.current_device() == 0
    for x, y in zip(expected, found, strict=True):
        assert y.device.index == 1 and torch.equal(x.cpu(), y.cpu())


def test_a_side_stream_does_not_run_ahead_of_its_inputs() -> None:
    case = bfloat16_case()
    expected = run_cross(ops.masked_cross_attention, case, backend="fused")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q = case.q * 1  # finished only after the sleep
        found = run_cross(ops.masked_cross_attention, case._replace(q=q), backend="fused")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_a_captured_graph_computes_with_new_inputs() -> None:
    case = bfloat16_case()
    q, grad = case.q.clone().requires_grad_(), case.grad
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = ops.masked_cross_attention(q, case.k, case.v, case.media_index, case.gate, backend="fused")
        return out, torch.autograd.grad(out, q, grad)[0]

    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dq = step()
    with torch.no_grad():
        q.mul_(0.5)
    graph.replay()
    expected, expected_dq = step()
    assert torch.equal(out, expected) and torch.equal(dq, expected_dq)


def test_a_compiled_function_equals_the_eager_one() -> None:
    case = bfloat16_case()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return ops.masked_cross_attention(q * 2, case.k, case.v, case.media_index, case.gate, backend="fused") + 1

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(case.q), attend(case.q))


def test_autocast_uses_the_kernels_for_float32_inputs() -> None:
    case = cross_case(PACKED, num_media=8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = ops.masked_cross_attention(*case[:4], backend="fused")
    assert out.dtype == torch.bfloat16


def test_recomputation_gives_the_same_gradients() -> None:
    case = bfloat16_case()
    gradients = []
    for recompute in (False, True):
        q = case.q.clone().requires_grad_()

        def attend(q: torch.Tensor) -> torch.Tensor:
            return ops.masked_cross_attention(q, case.k, case.v, case.media_index, case.gate, backend="fused")

        out = checkpoint(attend, q, use_reentrant=False) if recompute else attend(q)
        gradients.append(torch.autograd.grad(out, q, case.grad)[0])
    assert torch.equal(*gradients)


def test_nothing_to_compute() -> None:
    for num_media, index in ((8, []), (0, []), (0, [-1, -1])):
        case = cross_case(index, num_media=num_media, dtype=torch.bfloat16, device="cuda")
        results = run_cross(ops.masked_cross_attention, case, backend="fused")
        assert all(bool((x == 0).all()) for x in results)
    media = resampler_case([0, 0], dtype=torch.bfloat16, device="cuda")
    assert run_resampler(ops.resampler_attention, media, backend="fused")[0].isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_heads_that_share_keys(so_far: bool) -> None:
    shared = bfloat16_case(num_heads=6, num_kv_heads=2, so_far=so_far)
    check_fused(expect(shared))
    repeated = shared._replace(k=shared.k.repeat_interleave(3, 2), v=shared.v.repeat_interleave(3, 2))
    found, expected = (run_cross(ops.masked_cross_attention, x, backend="fused")[:2] for x in (shared, repeated))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_medium_of_6404_keys() -> None:
    options = {"num_media": 2, "num_heads": 8, "num_kv_heads": 2, "num_latents": 6404, "head_dim": 128}
    check_fused(expect(cross_case([0] * 300 + [1] * 100, dtype=torch.bfloat16, device="cuda", **options)))


@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_ranges_of_tokens_are_those_of_the_cpu_and_change_nothing(so_far: bool) -> None:
    case = bfloat16_case(so_far=so_far)
    ranges = ops.find_token_ranges(case.media_index, case.first_media, 8, case.q)
    index = [None if x is None else x.cpu() for x in (case.media_index, case.first_media)]
    assert ranges is not None and torch.equal(ranges.cpu(), torch.ops.flamingo.media_token_ranges(*index, 8))
    plain, given = (
        run_cross(ops.masked_cross_attention, case, backend="fused", **options)
        for options in ({}, {"token_ranges": ranges})
    )
    assert all(torch.equal(x, y) for x, y in zip(plain, given, strict=True))


def test_a_card_without_enough_shared_memory_computes_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_limits.card(0)._replace(shared_memory=99 * 1024)
    monkeypatch.setattr(cuda_limits, "card", lambda _index: found)
    case = bfloat16_case(head_dim=128)
    with pytest.raises(RuntimeError, match="head_dim 128 needs 112 KB of shared memory in the backward"):
        run_cross(ops.masked_cross_attention, case, backend="fused")
    fallback, plain = (run_cross(ops.masked_cross_attention, case, backend=name) for name in ("auto", "reference"))
    assert all(torch.equal(x, y) for x, y in zip(fallback[:2], plain[:2], strict=True))
