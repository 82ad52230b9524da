"""Compare the CPU kernels with float64 for random shapes, ragged media and degenerate indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import ops
from tests.ops.cases import (
    CrossCase,
    Expected,
    ResamplerCase,
    Results,
    assert_as_good_as,
    check_fused,
    cross_case,
    expect,
    resampler_by_torch,
    resampler_case,
    resampler_truth,
    run_cross,
    run_resampler,
)

pytestmark = pytest.mark.usefixtures("cpu_library")
bounded = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
head_dims = st.sampled_from([16, 48, 64, 96, 128])


@st.composite
def cross_cases(draw: st.DrawFn) -> CrossCase:
    num_media = draw(st.integers(1, 6))
    num_kv_heads = draw(st.integers(1, 2))
    runs = draw(st.lists(st.tuples(st.integers(-1, num_media - 1), st.integers(1, 90)), max_size=5))
    if draw(st.booleans()):
        runs.sort()
    return cross_case(
        [medium for medium, length in runs for _ in range(length)],
        num_media=num_media,
        num_latents=draw(st.integers(1, 140)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(head_dims),
        dtype=draw(dtypes),
        so_far=draw(st.booleans()),
        gate=draw(st.sampled_from([None, 0.0, -0.5, 3.0])),
        seed=draw(st.integers(0, 5)),
    )


@st.composite
def resampler_cases(draw: st.DrawFn) -> ResamplerCase:
    return resampler_case(
        draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        num_latents=draw(st.integers(1, 140)),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(head_dims),
        dtype=draw(dtypes),
        seed=draw(st.integers(0, 5)),
    )


def as_one_attention(results: Results) -> Results:
    """Join the gradients of all keys into one tensor, and those of all values, because one softmax covers them.

    A latent with hardly any attention has a tiny gradient, the difference of larger numbers. Alone it says little
    about the precision.
    """
    out, dq, dk_features, dv_features, dk_latents, dv_latents = results
    keys = torch.cat([dk_features.flatten(), dk_latents.flatten()])
    return out, dq, keys, torch.cat([dv_features.flatten(), dv_latents.flatten()])


@pytest.mark.slow
@bounded
@given(cross_cases())
def test_cross_attention(case: CrossCase) -> None:
    check_fused(expect(case), spacings=4)
    out, *_ = run_cross(ops.masked_cross_attention, case, backend="fused")
    assert (out[case.media_index < 0] == 0).all()


@pytest.mark.slow
@bounded
@given(resampler_cases())
def test_resampler(case: ResamplerCase) -> None:
    by_torch = [as_one_attention(results) for results in resampler_by_torch(case)]
    expected = Expected(case, by_torch, as_one_attention(resampler_truth(case)))
    by_kernel = run_resampler(ops.resampler_attention, case, backend="fused")
    assert_as_good_as(as_one_attention(by_kernel), expected, spacings=4)
