"""Build inputs for the two ops, and compare their results with float64.

A kernel is as good as plain torch in the same precision: its distance from float64 may be at most twice as large.
Shape letters: see ``model/__init__.py``.
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

# Plain torch runs in this many orders of summation (permuted head_dim, latents and tokens), and its own error is the
# largest of them. One order is too small a sample: torch's BLAS chooses it by processor, and a few keys with nearly all
# of the attention decide the largest error of a run. For head_dim 128 in float32 plain torch was off by 0.38e-6 to
# 1.07e-6, depending on the order, where a kernel was off by 0.97e-6; twice the error of the first order was 0.86e-6.
ORDERS = 16
# The root mean square hardly depends on the order (kernels: 0.8 to 1.0 times plain torch). It is compared too, for
# tensors of at least this many numbers, because it notices small errors everywhere that the largest one hides.
ENOUGH_FOR_MEAN = 1024
MEASURES: dict[str, Callable[[Tensor], float]] = {
    "largest": lambda error: error.max().item(),
    "mean": lambda error: error.square().mean().sqrt().item(),
}


class CrossCase(NamedTuple):
    """Arguments of ``masked_cross_attention`` and a gradient of its output.

    Attributes:
        q: [T, H, K] queries.
        k: [M, R, U, K] keys.
        v: [M, R, U, K] values.
        media_index: [T] medium of each text token.
        first_media: [T] first medium of each text token, or None.
        gate: [1], or None.
        grad: [T, H, K] gradient of the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    media_index: Tensor
    first_media: Tensor | None
    gate: Tensor | None
    grad: Tensor


class ResamplerCase(NamedTuple):
    """Arguments of ``resampler_attention`` and a gradient of its output.

    Attributes:
        q: [M, R, H, K] queries.
        k_features: [S, H, K] keys of the features.
        v_features: [S, H, K] values of the features.
        k_latents: [M, R, H, K] keys of the latents.
        v_latents: [M, R, H, K] values of the latents.
        cu_media: [M + 1] offsets of the media in the features.
        grad: [M, R, H, K] gradient of the output.
    """

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
    num_media: int,
    num_latents: int = 64,
    num_heads: int = 2,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    so_far: bool = False,
    gate: float | None = 0.7,
    seed: int = 0,
    device: str = "cpu",
) -> CrossCase:
    """Draw a case whose keys and values are slices of one fused projection.

    Args:
        media_index: Medium of each text token, -1 for none.
        num_media: M.
        num_latents: R.
        num_heads: H.
        num_kv_heads: U; None takes H.
        head_dim: K.
        dtype: Type of queries, keys, values and gradient.
        so_far: Whether a token sees up to three media instead of one.
        gate: Value of the gate; None for no gate.
        seed: Seed of the numbers; odd seeds give int64 indices, even ones int32.
        device: Device of all tensors.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    index = torch.tensor(media_index, dtype=torch.int64 if seed % 2 else torch.int32, device=device)
    k, v = normal(num_media, num_latents, 2, num_kv_heads or num_heads, head_dim).unbind(2)
    return CrossCase(
        q=normal(len(media_index), num_heads, head_dim),
        k=k,
        v=v,
        media_index=index,
        first_media=(index - 2).clamp_min(0) if so_far else None,
        gate=None if gate is None else torch.tensor([gate], device=device),
        grad=normal(len(media_index), num_heads, head_dim),
    )


def resampler_case(
    lengths: Sequence[int],
    *,
    num_latents: int = 64,
    num_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> ResamplerCase:
    """Draw a case with one medium for each length; keys and values are slices of fused projections."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_media, offsets = len(lengths), torch.tensor([0, *lengths]).cumsum(0)
    k_features, v_features = normal(sum(lengths), 2, num_heads, head_dim).unbind(1)
    k_latents, v_latents = normal(num_media, num_latents, 2, num_heads, head_dim).unbind(2)
    return ResamplerCase(
        q=normal(num_media, num_latents, num_heads, head_dim),
        k_features=k_features,
        v_features=v_features,
        k_latents=k_latents,
        v_latents=v_latents,
        cu_media=offsets.to(device, torch.int64 if seed % 2 else torch.int32),
        grad=normal(num_media, num_latents, num_heads, head_dim),
    )


def run_cross(op: Callable[..., Tensor], case: CrossCase, dtype: torch.dtype | None = None, **options: str) -> Results:
    """Return the output, then the gradients of q, k, v and of the gate where there is one.

    Args:
        op: ``masked_cross_attention`` of ``model.ops`` or of the reference.
        case: Its arguments.
        dtype: Type to compute in; None takes the case's own.
        **options: Further arguments of ``op``.
    """
    inputs = [_leaf(x, dtype) for x in (case.q, case.k, case.v)]
    gate = None if case.gate is None else _leaf(case.gate, dtype if dtype == torch.float64 else None)
    names = {"first_media_T" if op.__module__ == reference.__name__ else "first_media": case.first_media}
    out = op(*inputs, case.media_index, gate, **names, **options)
    wanted = inputs if gate is None else [*inputs, gate]
    return out.detach(), *torch.autograd.grad(out, wanted, case.grad.to(out.dtype))


def run_resampler(
    op: Callable[..., Tensor], case: ResamplerCase, dtype: torch.dtype | None = None, **options: str
) -> Results:
    """Return the output, then the gradients of the five tensors."""
    inputs = [_leaf(x, dtype) for x in case[:5]]
    out = op(*inputs, case.cu_media, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, case.grad.to(out.dtype))


def cross_truth(case: CrossCase) -> Results:
    """Compute the definition in float64."""
    return run_cross(reference.dense_masked_cross_attention, case, torch.float64)


def resampler_truth(case: ResamplerCase) -> Results:
    """Compute plain torch in float64."""
    return run_resampler(reference.resampler_attention, case, torch.float64)


def cross_by_torch(case: CrossCase) -> list[Results]:
    """Run plain torch in the case's own precision, in ``ORDERS`` orders of summation."""
    runs = [run_cross(reference.masked_cross_attention, case)]
    for seed in range(1, ORDERS):
        token = _order(len(case.q), seed, case.q.device)
        latent, dim = (_order(case.k.shape[axis], seed, case.q.device) for axis in (1, 3))
        q, grad = (x[token][..., dim] for x in (case.q, case.grad))
        k, v = (x[:, latent][..., dim] for x in (case.k, case.v))
        first = None if case.first_media is None else case.first_media[token]
        shuffled = CrossCase(q, k, v, case.media_index[token], first, case.gate, grad)
        out, dq, dk, dv, *dgate = run_cross(reference.masked_cross_attention, shuffled)
        token, latent, dim = (x.argsort() for x in (token, latent, dim))
        rows = (x[token][..., dim] for x in (out, dq))
        keys = (x[:, latent][..., dim] for x in (dk, dv))
        runs.append((*rows, *keys, *dgate))
    return runs


def resampler_by_torch(case: ResamplerCase) -> list[Results]:
    """Run plain torch in the case's own precision, in ``ORDERS`` orders of summation."""
    runs = [run_resampler(reference.resampler_attention, case)]
    for seed in range(1, ORDERS):
        latent, dim = (_order(case.q.shape[axis], seed, case.q.device) for axis in (1, 3))
        q, k_latents, v_latents, grad = (
            x[:, latent][..., dim] for x in (case.q, case.k_latents, case.v_latents, case.grad)
        )
        k_features, v_features = case.k_features[..., dim], case.v_features[..., dim]
        shuffled = ResamplerCase(q, k_features, v_features, k_latents, v_latents, case.cu_media, grad)
        results = run_resampler(reference.resampler_attention, shuffled)
        latent, dim = latent.argsort(), dim.argsort()
        runs.append(tuple(x[..., dim] if x.ndim == 3 else x[:, latent][..., dim] for x in results))
    return runs


def gate_terms(case: CrossCase) -> float:
    """Return the root of the summed squares of the terms of the gate's gradient: rounding errors grow with it."""
    if case.gate is None:
        return 0.0
    out, *_ = run_cross(reference.dense_masked_cross_attention, case._replace(gate=None), torch.float64)
    slope = 1 - case.gate.double().tanh() ** 2
    return (out * case.grad.double() * slope).norm().item()


class Expected(NamedTuple):
    """Hold a case with the results to compare a kernel's with.

    Attributes:
        case: Arguments of the op.
        by_torch: Results of plain torch in the same precision, one for each order of summation.
        truth: Results in float64.
        gate_terms: Scale of the gate's gradient, which comes last; None where there is no gate.
    """

    case: CrossCase | ResamplerCase
    by_torch: list[Results]
    truth: Results
    gate_terms: float | None = None


def expect(case: CrossCase | ResamplerCase) -> Expected:
    """Compute the results to compare a kernel's with."""
    if isinstance(case, ResamplerCase):
        return Expected(case, resampler_by_torch(case), resampler_truth(case))
    return Expected(case, cross_by_torch(case), cross_truth(case), gate_terms(case))


def assert_as_good_as(results: Results, expected: Expected, spacings: float = 1.0) -> None:
    """Assert that every result is at most twice as far from the truth as plain torch is in the same precision.

    The distance is the largest error and, for a tensor of many numbers, also the root mean square. A reference that is
    exact by chance (a single key, an empty tensor) asks for no more than eight spacings of float32 numbers, or half a
    spacing of the result's own type, at the size of the truth. The gate's gradient is one sum of many terms, and its
    spacing follows their size.

    Args:
        results: Results of the kernel.
        expected: Results to compare with.
        spacings: Factor of the bounds by spacing, for tensors of so few numbers that the reference's largest error
            says little about its precision.
    """
    for i, (x, exact, *references) in enumerate(zip(results, expected.truth, *expected.by_torch, strict=True)):
        assert x.shape == exact.shape
        if not exact.numel():
            continue
        assert bool(x.isfinite().all()), f"result {i} is not finite"
        error = (x.double() - exact).abs()
        errors = [(y.double() - exact).abs() for y in references]
        if exact.shape == (1,) and expected.gate_terms is not None:
            spacing = 16 * torch.finfo(torch.float32).eps * expected.gate_terms
        else:
            rounding = 8 if x.dtype == torch.float32 else 0.5
            spacing = torch.finfo(x.dtype).eps * rounding * exact.abs().max().item()
        for name, measure in MEASURES.items():
            if name == "mean" and exact.numel() < ENOUGH_FOR_MEAN:
                continue
            found, allowed = measure(error), max(2 * max(measure(e) for e in errors), spacings * spacing)
            assert found <= allowed, f"the {name} error of result {i} is {found:.2e}, allowed {allowed:.2e}"


def check_fused(expected: Expected, spacings: float = 1.0) -> None:
    """Compare the fused op with float64."""
    case = expected.case
    if isinstance(case, ResamplerCase):
        results = run_resampler(ops.resampler_attention, case, backend="fused")
    else:
        results = run_cross(ops.masked_cross_attention, case, backend="fused")
    assert_as_good_as(results, expected, spacings)


def _leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a leaf with the values and the memory layout of ``x``, or in another type."""
    return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()


def _order(length: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(device)


# Text as a packed batch has it: text before any medium, a medium of one token, one without text, a tail of one token.
PACKED = [-1] * 7 + [0] * 50 + [1] * 3 + [2] * 100 + [-1] * 20 + [3] + [5] * 90 + [6]
UNORDERED = [3, 0, -1, 1, 0, 1, 3, -1] * 9 + [2]
