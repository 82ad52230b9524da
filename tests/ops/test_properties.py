"""Any shapes, ragged media and degenerate indices: the CPU kernels and plain torch against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import ops
from model.ops import reference
from tests.ops.cases import (
    CrossCase,
    ResamplerCase,
    Results,
    assert_as_good_as,
    check_cross,
    cross_case,
    resampler_case,
    resampler_truth,
    run_cross,
    run_resampler,
)

pytestmark = pytest.mark.usefixtures("cpu_library")
bounded = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
widths = st.sampled_from([16, 48, 64, 96, 128])


@st.composite
def cross_cases(draw: st.DrawFn) -> CrossCase:
    media = draw(st.integers(1, 6))
    runs = draw(st.lists(st.tuples(st.integers(-1, media - 1), st.integers(1, 90)), max_size=5))
    if draw(st.booleans()):
        runs.sort()
    return cross_case(
        [medium for medium, length in runs for _ in range(length)],
        media=media,
        latents=draw(st.integers(1, 140)),
        heads=draw(st.integers(1, 3)),
        width=draw(widths),
        dtype=draw(dtypes),
        so_far=draw(st.booleans()),
        gate=draw(st.sampled_from([None, 0.0, -0.5, 3.0])),
        seed=draw(st.integers(0, 5)),
    )


@st.composite
def resampler_cases(draw: st.DrawFn) -> ResamplerCase:
    return resampler_case(
        draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        latents=draw(st.integers(1, 140)),
        heads=draw(st.integers(1, 3)),
        width=draw(widths),
        dtype=draw(dtypes),
        seed=draw(st.integers(0, 5)),
    )


def as_one_attention(results: Results) -> Results:
    """The gradients of all keys, and of all values, in one tensor each, as one softmax has them.

    A single latent that gets next to no attention has a gradient of next to nothing, a difference of larger numbers:
    it says little about the precision by itself.
    """
    out, dq, dk_features, dv_features, dk_latents, dv_latents = results
    keys = torch.cat([dk_features.flatten(), dk_latents.flatten()])
    return out, dq, keys, torch.cat([dv_features.flatten(), dv_latents.flatten()])


@bounded
@given(cross_cases())
def test_cross_attention(case: CrossCase) -> None:
    check_cross(case, spacings=4)
    out, *_ = run_cross(ops.masked_cross_attention, case, backend="fused")
    assert (out[case.media_index < 0] == 0).all()


@bounded
@given(resampler_cases())
def test_resampler(case: ResamplerCase) -> None:
    by_kernel = run_resampler(ops.resampler_attention, case, backend="fused")
    by_torch = run_resampler(reference.resampler_attention, case)
    exact = resampler_truth(case)
    assert_as_good_as(as_one_attention(by_kernel), as_one_attention(by_torch), as_one_attention(exact), spacings=4)
