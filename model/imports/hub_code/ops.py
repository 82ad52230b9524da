"""Compute the two attentions in plain torch; inside an export this file stands for ``model.ops``."""

from __future__ import annotations

from torch import Tensor

from model.ops.reference import masked_cross_attention as reference_cross_attention
from model.ops.reference import resampler_attention

__all__ = ["find_token_ranges", "masked_cross_attention", "resampler_attention"]


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
) -> Tensor:
    """Attend from each text token to the latents of the media that it may see (Flamingo, section 2.4).

    Args:
        q: [T, H, K] queries of the tokens, batch and length flattened.
        k: [M, R, U, K] keys. U divides H: neighboring heads of q share a head of k and v.
        v: [M, R, U, K] values.
        media_index: [T], medium that a token sees; -1 for none, which gives exactly 0.
        gate: [1]; the output is multiplied by ``tanh(gate)``.
        first_media: [T]; a token sees all media ``first_media[t]..media_index[t]``.
        token_ranges: None; only kernels need it.
        scale: Scale of the scores; None for ``K ** -0.5``.
    """
    return reference_cross_attention(q, k, v, media_index, gate, first_media_T=first_media, scale=scale)


def find_token_ranges(media_index: Tensor, first_media: Tensor | None, num_media: int, q: Tensor) -> None:
    """Return None, because plain torch does not need the ranges."""
