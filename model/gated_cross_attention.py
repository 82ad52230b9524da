"""Apply gated cross-attention between the frozen blocks of a language model (paper, section 3.2, figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import CrossAttentionConfig
from model.layers import FeedForward, Linear, tanh_gate
from model.ops import masked_cross_attention

KeysValues = tuple[Tensor, Tensor]


class MaskedCrossAttention(nn.Module):
    """Attend from each token to the latents of the medium, or media, that it may see; to none gives exactly 0.

    Projections have no biases. Without a bias in the output projection the gate may be applied before it, inside the
    fused op, without changing any value or gradient.
    """

    def __init__(self, dim: int, media_dim: int, num_heads: int, head_dim: int, media_norm: bool) -> None:
        """Build the projections.

        Args:
            dim: Dim of the language model's hidden states (D).
            media_dim: Dim of the latents (W).
            num_heads: Number of heads.
            head_dim: Dim of a head.
            media_norm: Whether a LayerNorm on the latents precedes keys and values.
        """
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.media_norm: nn.Module = nn.LayerNorm(media_dim) if media_norm else nn.Identity()
        self.query = Linear(dim, inner)
        self.key_value = Linear(media_dim, 2 * inner)
        self.output = Linear(inner, dim)

    def project_media(self, latents_MRW: Tensor) -> KeysValues:
        """Return keys and values [M, R, H, K] of the latents; generation computes them once."""
        projected = self.key_value(self.media_norm(latents_MRW))
        k_MRHK, v_MRHK = projected.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return k_MRHK, v_MRHK

    def forward(
        self,
        hidden_BLD: Tensor,
        keys_values: KeysValues,
        media_index_BL: Tensor,
        gate: Tensor,
        first_media_BL: Tensor | None = None,
    ) -> Tensor:
        """Return tanh(gate) * attention, [B, L, D]; ``model.ops`` defines ``media_index`` and ``first_media``."""
        q_BLHK = self.query(self.norm(hidden_BLD)).unflatten(-1, (self.num_heads, self.head_dim))
        first_media_T = None if first_media_BL is None else first_media_BL.flatten()
        out_THK = masked_cross_attention(
            q_BLHK.flatten(0, 1), *keys_values, media_index_BL.flatten(), gate, first_media=first_media_T
        )
        return self.output(out_THK.flatten(-2)).view_as(hidden_BLD)


class GatedCrossAttentionBlock(nn.Module):
    """Compute ``y += tanh(a) * attention(y, media); y += tanh(b) * feed_forward(y)``.

    Both gates start at 0, so at the start the block is the identity, bit for bit. Gates have shape (1,), because ZeRO-3
    cannot partition a parameter without dimensions.
    """

    def __init__(self, config: CrossAttentionConfig, dim: int, media_dim: int) -> None:
        """Build the block.

        Args:
            config: Settings of the cross-attention.
            dim: Dim of the language model's hidden states (D).
            media_dim: Dim of the latents (W).

        Raises:
            ValueError: ``num_heads`` is left out, and ``head_dim`` does not divide ``dim``.
        """
        super().__init__()
        num_heads = config.num_heads
        if num_heads is None:
            num_heads, rest = divmod(dim, config.head_dim)
            if rest:
                raise ValueError(
                    f"cross_attention.head_dim {config.head_dim} does not divide the language model's dim "
                    f"{dim}: set cross_attention.num_heads, or a head_dim that divides it"
                )
        self.attention = MaskedCrossAttention(dim, media_dim, num_heads, config.head_dim, config.media_norm)
        self.feed_forward = FeedForward(dim, config.ff_mult, config.activation)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def project_media(self, latents_MRW: Tensor) -> KeysValues:
        """Return keys and values of the latents, for ``keys_values`` of ``forward``."""
        return self.attention.project_media(latents_MRW)

    def forward(
        self,
        hidden_BLD: Tensor,
        latents_MRW: Tensor | None,
        media_index_BL: Tensor | None,
        first_media_BL: Tensor | None = None,
        *,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Return the input of the language model's block, [B, L, D].

        Args:
            hidden_BLD: Hidden states that come before it. Some language models keep them in float32 beside bfloat16
                weights; they stay so, and the cross-attention computes in the type of its own weights.
            latents_MRW: Latents of all media. Without them and without ``keys_values`` only the feed-forward runs.
            media_index_BL: Medium that each token sees, -1 for none.
            first_media_BL: First one of the run of media that each token sees; None where a token sees one medium.
            keys_values: Result of ``project_media``, instead of the latents.
        """
        if keys_values is None and latents_MRW is not None:
            keys_values = self.project_media(latents_MRW)
        dtype = self.feed_forward_gate.dtype
        if keys_values is not None:
            assert media_index_BL is not None, "media without a media_index"
            hidden_BLD = hidden_BLD + self.attention(
                hidden_BLD.to(dtype), keys_values, media_index_BL, self.attention_gate, first_media_BL
            )
        return hidden_BLD + tanh_gate(self.feed_forward_gate, hidden_BLD) * self.feed_forward(hidden_BLD.to(dtype))
