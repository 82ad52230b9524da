"""Compare the CUDA kernels with plain torch on the card at hand, before a model computes with them.

The tests prove the kernels on the cards that the project has. A driver, a compiler or a card that it has not met could
still make them wrong, and a wrong attention trains without an error. So the first use of a kernel for a type and a
width runs it once on small inputs, forward and backward, which takes milliseconds.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.ops import reference

logger = logging.getLogger(__name__)

Attention = Callable[..., Tensor]
# Of the largest number of a result. Rounding to bfloat16 causes a tenth of it; a row that reads a wrong key exceeds it.
_MOST_DIFFERENT = 0.05
# A tile of the kernels has 64 rows. 70 latents make two tiles, which another backward computes.
_NUM_LATENTS = (64, 70)
_TEXT = (-1, 5, *[0] * 90, *[1] * 3, *[3] * 70, *[4] * 65, -1)  # medium of each token; the second is out of order
_FEATURES = (130, 0, 63)  # features of each medium


class Attentions(NamedTuple):
    """Hold one way to compute the two ops.

    Attributes:
        cross: ``cross(q, k, v, gate_factor, media_index)``.
        resampler: ``resampler(q, k_features, v_features, k_latents, v_latents, cu_media)``.
    """

    cross: Attention
    resampler: Attention


@functools.cache
def disagreement(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return how the kernels differ from plain torch on a device, or None where they agree; it is compared once.

    Args:
        device: Device with its number.
        dtype: Type of the queries.
        head_dim: Dim of a head.
    """
    # A thread of its own has none of the modes of the caller: no autocast, inference mode, checkpoint or hooks.
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(compare, fused(), device, dtype, head_dim).result()
    if found is not None:
        logger.warning("%s: plain torch computes instead of the kernels", found)
    return found


def fused() -> Attentions:
    """Return the kernels, without the choice of a backend."""

    def cross(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, media_index: Tensor) -> Tensor:
        out: Tensor = torch.ops.flamingo.masked_cross_attention(
            q, k, v, media_index, None, factor, q.shape[-1] ** -0.5, None
        )
        return out

    def resampler(q: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor = torch.ops.flamingo.resampler_attention(q, *rest, q.shape[-1] ** -0.5)[0]
        return out

    return Attentions(cross, resampler)


def _plain() -> Attentions:
    def cross(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, media_index: Tensor) -> Tensor:
        return reference.masked_cross_attention(q, k, v, media_index) * factor

    return Attentions(cross, reference.resampler_attention)


def compare(attentions: Attentions, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return where an implementation differs from plain torch in float32, or None.

    Args:
        attentions: The implementation.
        device: Device to compute on.
        dtype: Type of the queries of the implementation.
        head_dim: Dim of a head.
    """
    for case in _cases(device, dtype, head_dim):
        found = _with_gradients(attentions, case, dtype)
        expected = _with_gradients(_plain(), case, torch.float32)
        for name, of_implementation, of_torch in zip(case.results, found, expected, strict=True):
            difference = ((of_implementation.float() - of_torch).abs().max() / of_torch.abs().max()).item()
            if not difference <= _MOST_DIFFERENT:  # NaN is no agreement
                size = "is not finite" if math.isnan(difference) else f"differs from plain torch by {difference:.0%}"
                where = f"{case.op} attention in {dtype} with head_dim {head_dim} on {device}"
                return f"{where}: {name} {size} of its largest number"
    return None


class _Case(NamedTuple):
    """Hold an op, the tensors that have gradients, the other arguments, and the names of the results."""

    op: str
    inputs: Sequence[Tensor]
    rest: Sequence[Tensor]
    results: Sequence[str]


def _cases(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, generator=generator).to(device, dtype)

    def keys_and_values(*shape: int) -> tuple[Tensor, Tensor]:
        return draw(*shape), draw(*shape)

    text = torch.tensor(_TEXT, device=device)
    ends = torch.tensor([0, *accumulate(_FEATURES)], device=device)
    features, media = sum(_FEATURES), len(_FEATURES)
    for latents in _NUM_LATENTS:
        factor = torch.tensor([0.5], device=device)
        # Four heads of the queries share two of the keys.
        inputs: tuple[Tensor, ...] = (draw(len(_TEXT), 4), *keys_and_values(max(_TEXT) + 1, latents, 2), factor)
        yield _Case("cross", inputs, [text], ("the output", *(f"the gradient of {x}" for x in ("q", "k", "v", "gate"))))
        inputs = (draw(media, latents, 2), *keys_and_values(features, 2), *keys_and_values(media, latents, 2))
        names = ("q", "k_features", "v_features", "k_latents", "v_latents")
        yield _Case("resampler", inputs, [ends], ("the output", *(f"the gradient of {x}" for x in names)))


def _with_gradients(attentions: Attentions, case: _Case, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of the inputs, computed in ``dtype``."""
    leaves = [x.to(dtype if x.dim() > 1 else x.dtype, copy=True).requires_grad_() for x in case.inputs]
    out = getattr(attentions, case.op)(*leaves, *case.rest)
    weights = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]
