"""Compare plain torch with the definition in float64, where the two must agree to rounding."""

from __future__ import annotations

import pytest
import torch

from model import ops
from model.ops import library, reference
from tests.ops.cases import (
    PACKED,
    UNORDERED,
    cross_case,
    cross_truth,
    resampler_case,
    run_cross,
    run_resampler,
)


@pytest.mark.parametrize("so_far", [False, True])
@pytest.mark.parametrize("index", [PACKED, UNORDERED, [-1] * 5, [0]], ids=["packed", "unordered", "blind", "one row"])
def test_grouping_tokens_computes_the_masked_attention(index: list[int], so_far: bool) -> None:
    case = cross_case(index, num_media=8, num_latents=5, head_dim=16, so_far=so_far)
    grouped = run_cross(reference.masked_cross_attention, case, torch.float64)
    for x, exact in zip(grouped, cross_truth(case), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-11)


def test_tokens_without_media_are_exactly_zero_even_if_latents_are_not_finite() -> None:
    case = cross_case([-1, 0, -1], num_media=2, num_latents=4, head_dim=16)
    case.v[1] = float("nan")
    out = reference.masked_cross_attention(case.q, case.k, case.v, case.media_index, case.gate)
    assert (out[[0, 2]] == 0).all()
    assert out.isfinite().all()


def test_without_media_the_output_is_zero_and_every_input_keeps_a_gradient() -> None:
    case = cross_case([-1] * 4, num_media=0, num_latents=4, head_dim=16)
    out, dq, dk, dv, dgate = run_cross(reference.masked_cross_attention, case)
    assert (out == 0).all()
    assert (dq == 0).all()
    assert (dgate == 0).all()
    assert dk.shape == case.k.shape == dv.shape


def test_the_gradient_of_a_gate_at_zero_is_that_of_the_ungated_output() -> None:
    case = cross_case([0] * 6, num_media=1, num_latents=4, head_dim=16, gate=0.0)
    ungated, *_ = run_cross(reference.masked_cross_attention, case._replace(gate=None), torch.float64)
    *_, dgate = run_cross(reference.masked_cross_attention, case, torch.float64)
    torch.testing.assert_close(dgate[0], (ungated * case.grad.double()).sum())


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 0, 7], [0], []])
def test_the_resampler_attends_to_the_features_and_latents_of_its_own_medium(lengths: list[int]) -> None:
    case = resampler_case(lengths, num_latents=3, head_dim=16)
    out, *_ = run_resampler(reference.resampler_attention, case, torch.float64)
    offsets = case.cu_media.tolist()
    for medium in range(len(lengths)):
        features = slice(offsets[medium], offsets[medium + 1])
        k = torch.cat([case.k_features[features], case.k_latents[medium]]).double()
        v = torch.cat([case.v_features[features], case.v_latents[medium]]).double()
        scores = torch.einsum("rhd,khd->hrk", case.q[medium].double(), k) / 4
        torch.testing.assert_close(out[medium], torch.einsum("hrk,khd->rhd", scores.softmax(-1), v))


def test_resampler_gradients_equal_finite_differences() -> None:
    case = resampler_case([2, 0, 3], num_latents=2, num_heads=1, head_dim=4)
    inputs = [x.double().requires_grad_() for x in case[:5]]
    assert torch.autograd.gradcheck(lambda *x: reference.resampler_attention(*x, case.cu_media), inputs)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_that_share_keys_and_values_equal_repeated_ones(backend: str, groups: int) -> None:
    if backend == "fused" and library.load_errors()["cpu"] is not None:
        pytest.skip("the CPU kernels are not built")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator) for shape in ((7, 4, 16), (3, 5, groups, 16), (3, 5, groups, 16))
    )
    index = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    repeated = [x.repeat_interleave(4 // groups, 2).requires_grad_() for x in (k, v)]
    shared = [x.requires_grad_() for x in (k, v)]
    expected, found = (ops.masked_cross_attention(q, *x, index, backend=backend) for x in (repeated, shared))
    if backend == "fused":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        out.square().sum().backward()
    for one, each in zip(shared, repeated, strict=True):
        torch.testing.assert_close(one.grad, each.grad.unflatten(2, (groups, -1)).sum(3))
