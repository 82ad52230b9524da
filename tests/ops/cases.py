"""Inputs for the two ops, and the comparison that all of their tests use.

The measure of a kernel is its distance from float64, compared with that of plain torch in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model import ops
from model.ops import reference

Results = tuple[Tensor, ...]
HALF_TYPES = (torch.bfloat16, torch.float16)


class CrossCase(NamedTuple):
    """Arguments of masked_cross_attention and a gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    media_index: Tensor
    first_media: Tensor | None
    gate: Tensor | None
    grad: Tensor


class ResamplerCase(NamedTuple):
    """Arguments of resampler_attention and a gradient of its output."""

    q: Tensor
    k_features: Tensor
    v_features: Tensor
    k_latents: Tensor
    v_latents: Tensor
    cu_media: Tensor
    grad: Tensor


def cross_case(
    media_index: Sequence[int],
    *,
    media: int,
    latents: int = 64,
    heads: int = 2,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    so_far: bool = False,
    gate: float | None = 0.7,
    seed: int = 0,
    device: str = "cpu",
) -> CrossCase:
    """Keys and values are slices of one fused projection; so_far: rows see up to three media, else one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    index = torch.tensor(media_index, dtype=torch.int64 if seed % 2 else torch.int32, device=device)
    k, v = normal(media, latents, 2, heads, width).unbind(2)
    return CrossCase(
        q=normal(len(media_index), heads, width),
        k=k,
        v=v,
        media_index=index,
        first_media=(index - 2).clamp_min(0) if so_far else None,
        gate=None if gate is None else torch.tensor([gate], device=device),
        grad=normal(len(media_index), heads, width),
    )


def resampler_case(
    lengths: Sequence[int],
    *,
    latents: int = 64,
    heads: int = 2,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> ResamplerCase:
    """One medium for each length; keys and values are slices of fused projections."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    media, offsets = len(lengths), torch.tensor([0, *lengths]).cumsum(0)
    k_features, v_features = normal(sum(lengths), 2, heads, width).unbind(1)
    k_latents, v_latents = normal(media, latents, 2, heads, width).unbind(2)
    return ResamplerCase(
        q=normal(media, latents, heads, width),
        k_features=k_features,
        v_features=v_features,
        k_latents=k_latents,
        v_latents=v_latents,
        cu_media=offsets.to(device, torch.int64 if seed % 2 else torch.int32),
        grad=normal(media, latents, heads, width),
    )


def run_cross(op: Callable[..., Tensor], case: CrossCase, dtype: torch.dtype | None = None, **options: str) -> Results:
    """Output, then the gradients of q, k, v and (where there is one) the gate. `dtype`: compute in it instead."""
    inputs = [_leaf(x, dtype) for x in (case.q, case.k, case.v)]
    gate = None if case.gate is None else _leaf(case.gate, dtype if dtype == torch.float64 else None)
    names = {"first_media_T" if op.__module__ == reference.__name__ else "first_media": case.first_media}
    out = op(*inputs, case.media_index, gate, **names, **options)
    wanted = inputs if gate is None else [*inputs, gate]
    return out.detach(), *torch.autograd.grad(out, wanted, case.grad.to(out.dtype))


def run_resampler(
    op: Callable[..., Tensor], case: ResamplerCase, dtype: torch.dtype | None = None, **options: str
) -> Results:
    """Output, then the gradients of the five tensors."""
    inputs = [_leaf(x, dtype) for x in case[:5]]
    out = op(*inputs, case.cu_media, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, case.grad.to(out.dtype))


def cross_truth(case: CrossCase) -> Results:
    """The definition, in float64."""
    return run_cross(reference.dense_masked_cross_attention, case, torch.float64)


def resampler_truth(case: ResamplerCase) -> Results:
    """Plain torch in float64."""
    return run_resampler(reference.resampler_attention, case, torch.float64)


def gate_terms(case: CrossCase) -> float:
    """Root of the summed squares of the terms of the gate's gradient: rounding errors of a sum grow with it."""
    if case.gate is None:
        return 0.0
    out, *_ = run_cross(reference.dense_masked_cross_attention, case._replace(gate=None), torch.float64)
    slope = 1 - case.gate.double().tanh() ** 2
    return (out * case.grad.double() * slope).norm().item()


def assert_as_good_as(
    results: Results,
    reference_results: Results,
    truth: Results,
    *,
    gate_terms: float | None = None,
    spacings: float = 1.0,
) -> None:
    """Every result is at most twice as far from the truth as plain torch is in the same precision.

    A reference that is exact by chance (a single key, an empty tensor) asks for no more than eight spacings of
    float32 numbers, or half a spacing of the result's own type, at the size of the truth. The gate's gradient, which
    comes last, is one sum of many terms: its error is compared with `gate_terms`. `spacings` multiplies these bounds,
    for tensors of so few numbers that the largest error of the reference says little about its precision.
    """
    for i, (x, by_reference, exact) in enumerate(zip(results, reference_results, truth, strict=True)):
        assert x.shape == exact.shape
        if not exact.numel():
            continue
        assert bool(x.isfinite().all()), f"result {i} is not finite"
        error = (x.double() - exact).abs().max().item()
        allowed = 2 * (by_reference.double() - exact).abs().max().item()
        if exact.shape == (1,) and gate_terms is not None:
            spacing = 16 * torch.finfo(torch.float32).eps * gate_terms
        else:
            rounding = 8 if x.dtype == torch.float32 else 0.5
            spacing = torch.finfo(x.dtype).eps * rounding * exact.abs().max().item()
        allowed = max(allowed, spacings * spacing)
        assert error <= allowed, f"result {i} is off by {error:.2e}, allowed {allowed:.2e}"


def check_cross(case: CrossCase, spacings: float = 1.0) -> None:
    """The fused op against float64, by the measure above."""
    fused = run_cross(ops.masked_cross_attention, case, backend="fused")
    by_torch = run_cross(reference.masked_cross_attention, case)
    assert_as_good_as(fused, by_torch, cross_truth(case), gate_terms=gate_terms(case), spacings=spacings)


def check_resampler(case: ResamplerCase) -> None:
    """The fused op against float64, by the measure above."""
    fused = run_resampler(ops.resampler_attention, case, backend="fused")
    by_torch = run_resampler(reference.resampler_attention, case)
    assert_as_good_as(fused, by_torch, resampler_truth(case))


def _leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A leaf with the values and the memory layout of `x`, or in another type."""
    return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()


# Text as a packed batch has it: text before any medium, a medium of one row, one without text, a tail of one row.
PACKED = [-1] * 7 + [0] * 50 + [1] * 3 + [2] * 100 + [-1] * 20 + [3] + [5] * 90 + [6]
UNORDERED = [3, 0, -1, 1, 0, 1, 3, -1] * 9 + [2]
