"""Gated cross-attention between the frozen blocks of a language model (paper, section 3.2, figure 4).

Shape suffixes: B rows, L tokens, M media, N latents of a medium, D width of the language model, W width of the
latents, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import CrossAttentionConfig
from model.layers import FeedForward, Linear, tanh_gate
from model.ops import masked_cross_attention

KeysValues = tuple[Tensor, Tensor]


class MaskedCrossAttention(nn.Module):
    """Each token attends to the latents of the medium (or media) that it may see; to none: exactly 0.

    Projections have no biases. Without a bias in the output projection the gate may be applied before it, inside the
    fused op, without a change of value or gradient.
    """

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int, media_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.norm = nn.LayerNorm(width)
        self.media_norm: nn.Module = nn.LayerNorm(media_width) if media_norm else nn.Identity()
        self.query = Linear(width, inner)
        self.key_value = Linear(media_width, 2 * inner)
        self.output = Linear(inner, width)

    def project_media(self, latents_MNW: Tensor) -> KeysValues:
        """Keys and values [M, N, H, K] of the latents [M, N, W]; generation computes them once."""
        projected = self.key_value(self.media_norm(latents_MNW))
        keys, values = projected.unflatten(-1, (2, self.heads, self.head_dim)).unbind(-3)
        return keys, values

    def forward(
        self,
        hidden_BLD: Tensor,
        keys_values: KeysValues,
        media_index_BL: Tensor,
        gate: Tensor,
        first_media_BL: Tensor | None = None,
    ) -> Tensor:
        """tanh(gate) * attention, [B, L, D]. ``media_index`` and ``first_media``: as ``model.ops`` defines them."""
        q_BLHK = self.query(self.norm(hidden_BLD)).unflatten(-1, (self.heads, self.head_dim))
        first_media = None if first_media_BL is None else first_media_BL.flatten()
        out_THK = masked_cross_attention(
            q_BLHK.flatten(0, 1), *keys_values, media_index_BL.flatten(), gate, first_media=first_media
        )
        return self.output(out_THK.flatten(-2)).view_as(hidden_BLD)


class GatedCrossAttentionBlock(nn.Module):
    """``y += tanh(a) * attention(y, media); y += tanh(b) * feed_forward(y)``, both gates starting at 0.

    At the start the block is therefore the identity, bit for bit. Gates have shape (1,): ZeRO-3 cannot partition a
    parameter without dimensions.
    """

    def __init__(self, config: CrossAttentionConfig, width: int, media_width: int) -> None:
        """width: of the language model; media_width: of the latents."""
        super().__init__()
        heads = config.num_heads
        if heads is None:
            heads, rest = divmod(width, config.head_dim)
            if rest:
                raise ValueError(
                    f"cross_attention.head_dim {config.head_dim} does not divide the language model's width "
                    f"{width}: set cross_attention.num_heads, or a head_dim that divides it"
                )
        self.attention = MaskedCrossAttention(width, media_width, heads, config.head_dim, config.media_norm)
        self.feed_forward = FeedForward(width, config.ff_mult, config.activation)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def project_media(self, latents_MNW: Tensor) -> KeysValues:
        """Keys and values of the latents, for ``keys_values`` of ``forward``."""
        return self.attention.project_media(latents_MNW)

    def forward(
        self,
        hidden_BLD: Tensor,
        latents_MNW: Tensor | None,
        media_index_BL: Tensor | None,
        first_media_BL: Tensor | None = None,
        *,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """What goes into the language model's block, [B, L, D].

        Args:
            hidden_BLD: what would have gone into it.
            latents_MNW: None, unless ``keys_values`` are given: there are no media, only the feed-forward branch runs.
            media_index_BL: the medium that each token sees, -1 for none.
            first_media_BL: the first one of the run that it sees; None where a token sees one medium.
            keys_values: of ``project_media``, instead of the latents.
        """
        if keys_values is None and latents_MNW is not None:
            keys_values = self.project_media(latents_MNW)
        if keys_values is not None:
            assert media_index_BL is not None, "media without a media_index"
            hidden_BLD = hidden_BLD + self.attention(
                hidden_BLD, keys_values, media_index_BL, self.attention_gate, first_media_BL
            )
        return hidden_BLD + tanh_gate(self.feed_forward_gate, hidden_BLD) * self.feed_forward(hidden_BLD)
