"""Compute the two attentions that decide a Flamingo's speed: fused where a kernel exists, in plain torch elsewhere.

Text attends to media by ``masked_cross_attention``. The latents of a perceiver resampler attend to the features of
their medium by ``resampler_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops import argument_checks as checks
from model.ops import reference
from model.ops.dispatch import OpStatus, get_backend, set_backend, status, use_fused
from model.ops.library import autocast_inputs, unit_last_stride

__all__ = [
    "OpStatus",
    "find_token_ranges",
    "get_backend",
    "masked_cross_attention",
    "resampler_attention",
    "set_backend",
    "status",
]


def masked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    media_index: Tensor,
    gate: Tensor | None = None,
    *,
    first_media: Tensor | None = None,
    token_ranges: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from each text token to the latents of the media that it may see (Flamingo, section 2.4).

    Args:
        q: [T, H, K] queries of the tokens, batch and length flattened.
        k: [M, R, U, K] keys; strided views (a slice of a fused projection) are fine. U divides H: neighboring heads of
            q share a head of k and v, which is never repeated in memory.
        v: [M, R, U, K] values.
        media_index: [T] int64 or int32, medium that a token sees; -1 for none, which gives exactly 0.
        gate: [1]; the output is multiplied by ``tanh(gate)``. This is valid when the output projection has no bias.
        first_media: [T]; a token sees all media ``first_media[t]..media_index[t]``. None shows it the last of them.
        token_ranges: Result of ``find_token_ranges`` for this ``media_index`` and ``first_media``; None lets the
            backward find them.
        scale: Scale of the scores; None for ``K ** -0.5``.
        backend: "fused" or "reference" to force one; None follows ``set_backend`` and ``FLAMINGO_OPS``.

    Returns:
        [T, H, K] in the type of ``q``, or of autocast where that is on.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument does not fit the others; the message names it. On CUDA a ``media_index`` out of range
            stops the kernel: a device-side assertion, or an unspecified launch failure on compute capability 9.0.
        RuntimeError: ``backend="fused"``, and no kernel can be used.
    """
    q, k, v = autocast_inputs(q.device.type, q, k, v)
    checks.masked_cross_attention(q, k, v, media_index, gate, first_media, scale)
    if token_ranges is not None:
        checks.token_ranges(token_ranges, k)
    if use_fused("masked_cross_attention", q, backend):
        out_scale = None if gate is None else torch.tanh(gate.float()).view(1)
        return torch.ops.flamingo.masked_cross_attention(
            *map(unit_last_stride, (q, k, v)),
            media_index.contiguous(),
            None if first_media is None else first_media.contiguous(),
            out_scale,
            q.shape[-1] ** -0.5 if scale is None else scale,
            token_ranges,
        )
    return reference.masked_cross_attention(q, k, v, media_index, gate, first_media_T=first_media, scale=scale)


def find_token_ranges(media_index: Tensor, first_media: Tensor | None, num_media: int, q: Tensor) -> Tensor | None:
    """Find once what the backward of every cross-attention to the same media needs on a GPU.

    Args:
        media_index: [T], as for ``masked_cross_attention``, or [B, L].
        first_media: The same shape, or None.
        num_media: M.
        q: Any tensor with device, type and last dimension of the queries.

    Returns:
        int32 [2, M]: the first token that sees a medium, and the one behind the last; or None where nothing needs it:
        without gradients, on the CPU, and without a kernel.
    """
    [q] = autocast_inputs(q.device.type, q)
    if q.device.type == "cpu" or not torch.is_grad_enabled() or not use_fused("masked_cross_attention", q, None):
        return None
    first_media = None if first_media is None else first_media.flatten().contiguous()
    ranges: Tensor = torch.ops.flamingo.media_token_ranges(media_index.flatten().contiguous(), first_media, num_media)
    return ranges


def resampler_attention(
    q: Tensor,
    k_features: Tensor,
    v_features: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    cu_media: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from the latents of each medium to its features and to the latents (Flamingo, section 2.2).

    Args:
        q: [M, R, H, K] queries of the latents.
        k_features: [S, H, K] keys of the features of all media, one medium after the other.
        v_features: [S, H, K] values of the features.
        k_latents: [M, R, H, K] keys of the latents; they are never concatenated with those of the features.
        v_latents: [M, R, H, K] values of the latents.
        cu_media: [M + 1] int64 or int32; medium m owns the features ``cu_media[m]:cu_media[m + 1]``.
        scale: Scale of the scores; None for ``K ** -0.5``.
        backend: "fused" or "reference" to force one; None follows ``set_backend`` and ``FLAMINGO_OPS``.

    Returns:
        [M, R, H, K] in the type of ``q``, or of autocast where that is on.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument does not fit the others; the message names it.
        RuntimeError: ``backend="fused"``, and no kernel can be used.
    """
    q, k_features, v_features, k_latents, v_latents = autocast_inputs(
        q.device.type, q, k_features, v_features, k_latents, v_latents
    )
    checks.resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media, scale)
    if use_fused("resampler_attention", q, backend):
        inputs = map(unit_last_stride, (q, k_features, v_features, k_latents, v_latents))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, _ = torch.ops.flamingo.resampler_attention(*inputs, cu_media.contiguous(), scale)
        return out
    return reference.resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media, scale=scale)
