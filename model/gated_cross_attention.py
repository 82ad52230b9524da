"""Apply gated cross-attention between the frozen blocks of a language model (paper, section 3.2, figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import CrossAttentionConfig
from model.layers import FeedForward, Linear, build_head_norm, build_norm, tanh_gate
from model.ops import masked_cross_attention

KeysValues = tuple[Tensor, Tensor]


class MaskedCrossAttention(nn.Module):
    """Attend from each token to the latents of the medium, or media, that it may see; to none gives exactly 0.

    Projections have no biases. Without a bias in the output projection a scalar gate may be applied before it, inside
    the fused op, without changing any value or gradient.
    """

    def __init__(self, config: CrossAttentionConfig, dim: int, media_dim: int) -> None:
        """Build the projections.

        Args:
            config: Settings of the cross-attention.
            dim: Dim of the language model's hidden states (D).
            media_dim: Dim of the latents (W).

        Raises:
            ValueError: The heads do not fit the dim, or each other.
        """
        super().__init__()
        self.num_heads, self.num_kv_heads = _count_heads(config, dim)
        self.head_dim = config.head_dim
        inner = self.num_heads * self.head_dim
        self.norm = build_norm(config.norm, dim, config.norm_eps)
        self.media_norm: nn.Module = nn.LayerNorm(media_dim) if config.media_norm else nn.Identity()
        self.query = Linear(dim, inner)
        self.key_value = Linear(media_dim, 2 * self.num_kv_heads * self.head_dim)
        self.output = Linear(inner, dim)
        self.query_norm = build_head_norm(config.qk_norm, self.head_dim, config.norm_eps)
        self.key_norm = build_head_norm(config.qk_norm, self.head_dim, config.norm_eps)
        self.gate_is_vector = config.gate == "vector"

    def project_media(self, latents_MRW: Tensor) -> KeysValues:
        """Return keys and values [M, R, U, K] of the latents; generation computes them once."""
        projected = self.key_value(self.media_norm(latents_MRW))
        k_MRUK, v_MRUK = projected.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(-3)
        return self.key_norm(k_MRUK), v_MRUK

    def forward(
        self,
        hidden_BLD: Tensor,
        keys_values: KeysValues,
        media_index_BL: Tensor,
        gate: Tensor | None,
        first_media_BL: Tensor | None = None,
        token_ranges: Tensor | None = None,
    ) -> Tensor:
        """Return tanh(gate) * attention, [B, L, D]; ``model.ops`` defines the arguments about media."""
        q_BLHK = self.query(self.norm(hidden_BLD)).unflatten(-1, (self.num_heads, self.head_dim))
        first_media_T = None if first_media_BL is None else first_media_BL.flatten()
        out_THK = masked_cross_attention(
            self.query_norm(q_BLHK).flatten(0, 1),
            *keys_values,
            media_index_BL.flatten(),
            None if self.gate_is_vector else gate,
            first_media=first_media_T,
            token_ranges=token_ranges,
        )
        out_BLD = self.output(out_THK.flatten(-2)).view_as(hidden_BLD)
        return out_BLD if gate is None or not self.gate_is_vector else tanh_gate(gate, out_BLD) * out_BLD


class GatedCrossAttentionBlock(nn.Module):
    """Compute ``y += tanh(a) * attention(y, media); y += tanh(b) * feed_forward(y)``.

    Both gates start at 0, so at the start the block is the identity, bit for bit. Scalar gates have shape (1,), because
    ZeRO-3 cannot partition a parameter without dimensions. With ``gate: none`` there are no gates and no tanh.
    """

    def __init__(self, config: CrossAttentionConfig, dim: int, media_dim: int) -> None:
        """Build the block.

        Args:
            config: Settings of the cross-attention.
            dim: Dim of the language model's hidden states (D).
            media_dim: Dim of the latents (W).

        Raises:
            ValueError: The heads do not fit ``dim``, or each other.
        """
        super().__init__()
        self.attention = MaskedCrossAttention(config, dim, media_dim)
        hidden_dim = config.ff_dim or config.ff_mult * dim
        self.feed_forward = FeedForward(dim, hidden_dim, config.activation, config.norm, config.norm_eps)
        self.runs_without_media = config.without_media == "feed_forward"
        size = 1 if config.gate == "scalar" else dim
        self.attention_gate = None if config.gate == "none" else nn.Parameter(torch.zeros(size))
        self.feed_forward_gate = None if config.gate == "none" else nn.Parameter(torch.zeros(size))

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
        has_media_BL: Tensor | None = None,
        token_ranges: Tensor | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Return the input of the language model's block, [B, L, D].

        Args:
            hidden_BLD: Hidden states that come before it. Some language models keep them in float32 beside bfloat16
                weights; they stay so, and the cross-attention computes in the type of its own weights.
            latents_MRW: Latents of all media. Without them and without ``keys_values`` only the feed-forward runs, or
                nothing (``without_media``).
            media_index_BL: Medium that each token sees, -1 for none.
            first_media_BL: First one of the run of media that each token sees; None where a token sees one medium.
            has_media_BL: Whether the feed-forward acts on a token; None for all tokens.
            token_ranges: ``model.ops.find_token_ranges`` of the indices, once for all layers; or None.
            keys_values: Result of ``project_media``, instead of the latents.
        """
        if keys_values is None and latents_MRW is not None:
            keys_values = self.project_media(latents_MRW)
        if keys_values is None and not self.runs_without_media:
            return hidden_BLD
        dtype = self.feed_forward.up.weight.dtype
        if keys_values is not None:
            assert media_index_BL is not None, "media without a media_index"
            hidden_BLD = hidden_BLD + self.attention(
                hidden_BLD.to(dtype), keys_values, media_index_BL, self.attention_gate, first_media_BL, token_ranges
            )
        wide_BLD = self.feed_forward(hidden_BLD.to(dtype))
        if has_media_BL is not None:
            wide_BLD = wide_BLD.masked_fill(~has_media_BL[..., None], 0.0)
        if self.feed_forward_gate is None:
            return hidden_BLD + wide_BLD
        return hidden_BLD + tanh_gate(self.feed_forward_gate, hidden_BLD) * wide_BLD


def _count_heads(config: CrossAttentionConfig, dim: int) -> tuple[int, int]:
    """Return the heads of the queries, and those of keys and values.

    Raises:
        ValueError: The heads do not fit the language model's ``dim``, or each other.
    """
    num_heads = config.num_heads
    if num_heads is None:
        num_heads, rest = divmod(dim, config.head_dim)
        if rest:
            raise ValueError(
                f"cross_attention.head_dim {config.head_dim} does not divide the language model's dim "
                f"{dim}: set cross_attention.num_heads, or a head_dim that divides it"
            )
    num_kv_heads = config.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"cross_attention.num_kv_heads {num_kv_heads} does not divide the {num_heads} heads of the queries: set a "
            "number that divides them, or leave it out"
        )
    return num_heads, num_kv_heads
