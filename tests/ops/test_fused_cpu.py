"""Compare the CPU kernels of every instruction set with float64, and check their contract with torch."""

from __future__ import annotations

import functools

import pytest
import torch

from model import ops
from tests.ops.cases import (
    PACKED,
    UNORDERED,
    Expected,
    check_fused,
    cross_case,
    cross_truth,
    expect,
    resampler_case,
    run_cross,
    run_resampler,
)

INSTRUCTION_SETS = ["generic", "avx2", "avx512", "avx512_bf16"]
pytestmark = pytest.mark.usefixtures("cpu_library")


@functools.cache  # the kernels of all instruction sets are compared with the same results
def expected_of_cross_attention(dtype: torch.dtype, head_dim: int, so_far: bool) -> list[Expected]:
    settings = {"num_media": 8, "head_dim": head_dim, "dtype": dtype, "so_far": so_far}
    inputs = ((64, PACKED), (5, PACKED), (70, UNORDERED))
    return [expect(cross_case(index, num_latents=num_latents, **settings)) for num_latents, index in inputs]


@functools.cache
def expected_of_resampler(dtype: torch.dtype, head_dim: int) -> list[Expected]:
    inputs = ((64, [100, 0, 63]), (7, [64, 65, 1]), (70, [30, 70]))
    return [
        expect(resampler_case(lengths, num_latents=num_latents, head_dim=head_dim, dtype=dtype))
        for num_latents, lengths in inputs
    ]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_cross_attention(instruction_set: str, dtype: torch.dtype, head_dim: int, so_far: bool) -> None:
    for expected in expected_of_cross_attention(dtype, head_dim, so_far):
        check_fused(expected)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_resampler(instruction_set: str, dtype: torch.dtype, head_dim: int) -> None:
    for expected in expected_of_resampler(dtype, head_dim):
        check_fused(expected)


@pytest.mark.parametrize("index", [[-1] * 5, [0], [], [7]], ids=["blind", "one row", "no rows", "last medium"])
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_degenerate_indices_are_exact(index: list[int], so_far: bool) -> None:
    case = cross_case(index, num_media=8, so_far=so_far)
    fused = run_cross(ops.masked_cross_attention, case, backend="fused")
    for x, exact in zip(fused, cross_truth(case), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-5)


def test_batches_without_media_give_zeros() -> None:
    out, *grads = run_cross(ops.masked_cross_attention, cross_case([-1] * 3, num_media=0), backend="fused")
    assert (out == 0).all()
    assert (grads[0] == 0).all()
    out, *_ = run_resampler(ops.resampler_attention, resampler_case([]), backend="fused")
    assert out.shape == (0, 64, 2, 64)


def test_media_without_text_and_tokens_without_media_get_exactly_zero_gradients() -> None:
    case = cross_case(PACKED, num_media=8)
    out, dq, dk, dv, _ = run_cross(ops.masked_cross_attention, case, backend="fused")
    blind = case.media_index < 0
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()
    for medium in (4, 7):
        assert (dk[medium] == 0).all()
        assert (dv[medium] == 0).all()


def test_large_scores_do_not_overflow_and_a_nan_stays_in_its_medium() -> None:
    case = cross_case([0] * 8 + [1] * 8, num_media=2)
    out = ops.masked_cross_attention(case.q * 1e4, case.k, case.v, case.media_index, backend="fused")
    assert out.isfinite().all()
    case.k[1, 3] = float("nan")
    out = ops.masked_cross_attention(case.q, case.k, case.v, case.media_index, backend="fused")
    assert out[:8].isfinite().all()
    assert out[8:].isnan().all()


def test_a_gate_of_zero_has_the_gradient_of_the_ungated_output() -> None:
    check_fused(expect(cross_case(PACKED, num_media=8, gate=0.0)))


def test_any_strides_of_tokens_and_heads_are_read() -> None:
    case = cross_case(PACKED, num_media=8)
    heads_first = case._replace(
        q=case.q.transpose(0, 1).contiguous().transpose(0, 1), grad=case.grad.transpose(1, 2).contiguous().mT
    )
    plain = run_cross(ops.masked_cross_attention, case, backend="fused")
    strided = run_cross(ops.masked_cross_attention, heads_first, backend="fused")
    for x, y in zip(plain, strided, strict=True):
        assert torch.equal(x, y)


def test_results_do_not_depend_on_threads_or_repetition() -> None:
    case, before = cross_case(PACKED * 3, num_media=8, so_far=True), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(run_cross(ops.masked_cross_attention, case, backend="fused"))
    finally:
        torch.set_num_threads(before)
    for results in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], results, strict=True))


SHARED = pytest.mark.parametrize("num_kv_heads", [1, 2])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@functools.cache
def expected_of_shared_heads(dtype: torch.dtype) -> list[Expected]:
    packed = cross_case(PACKED[40:150], num_media=3, num_heads=6, num_kv_heads=2, dtype=dtype)
    unordered = cross_case(
        UNORDERED[:40], num_media=4, num_heads=3, num_kv_heads=1, num_latents=70, so_far=True, dtype=dtype
    )
    return [expect(packed), expect(unordered)]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@DTYPES
def test_heads_that_share_keys(instruction_set: str, dtype: torch.dtype) -> None:
    for expected in expected_of_shared_heads(dtype):
        check_fused(expected)


@DTYPES
@SHARED
def test_shared_keys_equal_repeated_ones_and_their_gradients_are_sums(dtype: torch.dtype, num_kv_heads: int) -> None:
    case = cross_case(PACKED, num_media=8, num_heads=6, num_kv_heads=num_kv_heads, dtype=dtype)
    k, v = (x.repeat_interleave(6 // num_kv_heads, 2) for x in (case.k, case.v))
    shared, repeated = (
        run_cross(ops.masked_cross_attention, x, backend="fused") for x in (case, case._replace(k=k, v=v))
    )
    for i in (0, 1):
        assert torch.equal(shared[i], repeated[i])
    torch.testing.assert_close(shared[4], repeated[4])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # repeated gradients are rounded before the sum
    for one, each in zip(shared[2:4], repeated[2:4], strict=True):
        total = each.float().unflatten(2, (num_kv_heads, -1)).sum(3)
        assert (one.float() - total).abs().max() <= tolerance * total.abs().max()


@DTYPES
def test_a_medium_of_6404_keys(dtype: torch.dtype) -> None:
    """Llama 3.2 Vision has so many: four tiles of 1,601 patches."""
    options = {"num_heads": 2, "num_kv_heads": 1, "num_latents": 6404, "dtype": dtype}
    check_fused(expect(cross_case([-1] + [0] * 20, num_media=1, **options)))


@pytest.mark.parametrize("index", [PACKED, UNORDERED, [-1] * 5, []], ids=["packed", "unordered", "blind", "no rows"])
@pytest.mark.parametrize("so_far", [False, True], ids=["one medium", "so far"])
def test_ranges_of_tokens(index: list[int], so_far: bool) -> None:
    case = cross_case(index, num_media=8, num_latents=1, so_far=so_far, head_dim=16)
    begin, end = torch.ops.flamingo.media_token_ranges(case.media_index, case.first_media, 8).tolist()
    first = case.media_index if case.first_media is None else case.first_media
    for medium in range(8):
        sees = [t for t, last in enumerate(index) if last >= 0 and first[t] <= medium <= last]
        assert (begin[medium], end[medium]) == ((sees[0], sees[-1] + 1) if sees else (len(index), 0))


def test_ranges_of_tokens_are_found_for_gradients_on_a_gpu_only() -> None:
    index, q = torch.tensor([[0, 0], [1, -1]]), torch.zeros(0, 64, dtype=torch.bfloat16)
    assert ops.find_token_ranges(index, None, 2, q) is None
    assert ops.find_token_ranges(index, None, 2, q.to("meta")) is None, "no kernels for the device"
    ranges = torch.ops.flamingo.media_token_ranges(index.flatten(), None, 2)
    assert ranges.tolist() == [[0, 2], [2, 3]]
    case = cross_case([0, 0, 1, -1], num_media=2)
    plain = run_cross(ops.masked_cross_attention, case, backend="fused")
    given = run_cross(ops.masked_cross_attention, case, backend="fused", token_ranges=ranges)
    assert all(torch.equal(x, y) for x, y in zip(plain, given, strict=True))


def test_opcheck_ranges_of_tokens() -> None:
    case = cross_case(PACKED[:80], num_media=8, so_far=True)
    torch.library.opcheck(torch.ops.flamingo.media_token_ranges.default, (case.media_index, case.first_media, 8))


@pytest.mark.parametrize(("so_far", "num_kv_heads"), [(False, 2), (True, 1)], ids=["one medium", "so far, shared"])
def test_opcheck_cross_attention(so_far: bool, num_kv_heads: int) -> None:
    case = cross_case(PACKED[:80], num_media=8, num_kv_heads=num_kv_heads, so_far=so_far)
    inputs = [x.detach().clone().requires_grad_() for x in case[:3]]
    out_scale = torch.tensor([0.5], requires_grad=True)
    args = (*inputs, case.media_index, case.first_media, out_scale, 0.125)
    torch.library.opcheck(torch.ops.flamingo.masked_cross_attention.default, args)
    detached = [None if x is None else x.detach() for x in args[:-1]]
    torch.library.opcheck(torch.ops.flamingo.masked_cross_attention_backward.default, (case.grad, *detached, 0.125))


def test_opcheck_resampler() -> None:
    case = resampler_case([20, 0, 70])
    inputs = [x.detach().clone().requires_grad_() for x in case[:5]]
    args = (*inputs, case.cu_media, 0.125)
    torch.library.opcheck(torch.ops.flamingo.resampler_attention.default, args)
    detached = [x.detach() for x in args[:-1]]
    out, lse = torch.ops.flamingo.resampler_attention(*detached, 0.125)
    torch.library.opcheck(
        torch.ops.flamingo.resampler_attention_backward.default, (case.grad, out, lse, *detached, 0.125)
    )
