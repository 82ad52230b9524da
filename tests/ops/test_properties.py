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
    assert_as_good_as,
    cross_case,
    cross_truth,
    gate_terms,
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


@bounded
@given(cross_cases())
def test_cross_attention(case: CrossCase) -> None:
    results = run_cross(ops.masked_cross_attention, case, backend="fused")
    by_torch = run_cross(reference.masked_cross_attention, case)
    assert_as_good_as(results, by_torch, cross_truth(case), gate_terms=gate_terms(case), spacings=4)
    assert (results[0][case.media_index < 0] == 0).all()


@bounded
@given(resampler_cases())
def test_resampler(case: ResamplerCase) -> None:
    results = run_resampler(ops.resampler_attention, case, backend="fused")
    by_torch = run_resampler(reference.resampler_attention, case)
    assert_as_good_as(results, by_torch, resampler_truth(case), spacings=4)
