"""Resample any number of visual features of a medium to a fixed number of latents (paper, section 3.1, figure 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PerceiverResamplerConfig
from model.layers import FeedForward, Linear, build_head_norm, empty_for_drawing
from model.ops import resampler_attention


class PerceiverAttention(nn.Module):
    """Attend from the latents of a medium to its features and to the latents; nothing is concatenated."""

    def __init__(self, dim: int, config: PerceiverResamplerConfig) -> None:
        """Build the projections for latents and features of ``dim`` (W)."""
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        inner = self.num_heads * self.head_dim
        self.norm_features = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.query = Linear(dim, inner)
        self.key_value = Linear(dim, 2 * inner)
        self.output = Linear(inner, dim)
        self.query_norm = build_head_norm(config.qk_norm, self.head_dim)
        self.key_norm = build_head_norm(config.qk_norm, self.head_dim)

    def forward(self, features_SW: Tensor, latents_MRW: Tensor, cu_media: Tensor) -> Tensor:
        """Return [M, R, W] from features of all media, one after the other, and their offsets ``cu_media`` [M + 1]."""
        latents_MRW = self.norm_latents(latents_MRW)
        q_MRHK = self.query_norm(self.query(latents_MRW).unflatten(-1, (self.num_heads, self.head_dim)))
        k_features_SHK, v_features_SHK = self._keys_values(self.norm_features(features_SW))
        k_latents_MRHK, v_latents_MRHK = self._keys_values(latents_MRW)
        out_MRHK = resampler_attention(q_MRHK, k_features_SHK, v_features_SHK, k_latents_MRHK, v_latents_MRHK, cu_media)
        return self.output(out_MRHK.flatten(-2))

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return self.key_norm(keys), values


class PerceiverLayer(nn.Module):
    """Apply attention and feed-forward, both residual."""

    def __init__(self, dim: int, config: PerceiverResamplerConfig) -> None:
        """Build a layer for latents and features of ``dim`` (W)."""
        super().__init__()
        self.attention = PerceiverAttention(dim, config)
        self.feed_forward = FeedForward(dim, config.ff_dim or config.ff_mult * dim, config.activation)

    def forward(self, features_SW: Tensor, latents_MRW: Tensor, cu_media: Tensor) -> Tensor:
        """Return the new latents, [M, R, W]."""
        latents_MRW = latents_MRW + self.attention(features_SW, latents_MRW, cu_media)
        return latents_MRW + self.feed_forward(latents_MRW)


class PerceiverResampler(nn.Module):
    """Resample features [M, F, S, V] to latents [M, R, W].

    A learned embedding is added to all features of a frame. There are no spatial embeddings, so any image size is
    allowed (paper, appendix A.1.1). An image is a video of one frame.

    Attributes:
        dim: Dim of the latents (W).
        num_frames: Number of trained time embeddings.
    """

    def __init__(self, config: PerceiverResamplerConfig, vision_dim: int) -> None:
        """Build the resampler for features of ``vision_dim`` (V)."""
        super().__init__()
        self.dim = config.dim or vision_dim
        self.num_frames = config.num_frames
        self.project: nn.Module = nn.Identity() if self.dim == vision_dim else Linear(vision_dim, self.dim)
        self.latents = nn.Parameter(_draw_normal(config.num_latents, self.dim))
        self.time_embeddings = nn.Parameter(_draw_normal(config.num_frames, self.dim)) if config.num_frames else None
        self.layers = nn.ModuleList(PerceiverLayer(self.dim, config) for _ in range(config.num_layers))
        self.norm: nn.Module = nn.LayerNorm(self.dim) if config.final_norm else nn.Identity()

    def forward(
        self, features: Tensor, cu_media: Tensor | None = None, frame_of_feature: Tensor | None = None
    ) -> Tensor:
        """Resample media of one shape, or of different lengths.

        Args:
            features: [M, F, S, V]; with ``cu_media`` those of all media, one medium after the other, [S, V].
            cu_media: Offsets of the media in the features, [M + 1].
            frame_of_feature: int64 [S], the frame of each feature, below the trained number of frames. Only with
                ``cu_media``; None takes every medium for an image.

        Returns:
            Latents [M, R, W].

        Raises:
            ValueError: Features have another number of dimensions.
        """
        if features.ndim != (4 if cu_media is None else 2):
            raise ValueError(f"features have shape {list(features.shape)}; expected [M, F, S, V], or [S, V] + cu_media")
        if cu_media is None:
            num_media, num_frames, per_frame, _ = features.shape
            features_SW = self.project_frames(features).flatten(0, 2)
            cu_media = torch.arange(num_media + 1, device=features.device) * (num_frames * per_frame)
        else:
            features_SW = self.project(features)
            if self.time_embeddings is not None:
                frame: int | Tensor = 0 if frame_of_feature is None else frame_of_feature
                features_SW = features_SW + self.time_embeddings[frame]
        latents_MRW = self.latents.expand(cu_media.numel() - 1, -1, -1)
        for layer in self.layers:
            latents_MRW = layer(features_SW, latents_MRW, cu_media)
        return self.norm(latents_MRW)

    def project_frames(self, features_MFSV: Tensor) -> Tensor:
        """Return projected features with the time embeddings of their frames, [M, F, S, W]."""
        projected_MFSW: Tensor = self.project(features_MFSV)
        if self.time_embeddings is None:
            return projected_MFSW
        return projected_MFSW + interpolate_time(self.time_embeddings, features_MFSV.shape[1])[:, None]


class LinearProjector(nn.Module):
    """Project features [..., S, V] to as many latents, with a bias and nothing else (Llama 3.2 Vision).

    Attributes:
        dim: Dim of the latents (W).
        layers: None, which code that counts a resampler's layers expects to find.
    """

    def __init__(self, config: PerceiverResamplerConfig, vision_dim: int) -> None:
        """Build the projector for features of ``vision_dim`` (V)."""
        super().__init__()
        self.dim = config.dim or vision_dim
        self.project = Linear(vision_dim, self.dim)
        self.bias = nn.Parameter(torch.zeros(self.dim))
        self.layers = nn.ModuleList()

    def forward(self, features: Tensor) -> Tensor:
        """Return latents of the same shape, [..., W]."""
        return self.project(features) + self.bias


class FeedForwardProjector(LinearProjector):
    """Project features as ``LinearProjector`` does, and apply a feed-forward to each (paper, table 3, "MLP")."""

    def __init__(self, config: PerceiverResamplerConfig, vision_dim: int) -> None:
        """Build the projector for features of ``vision_dim`` (V)."""
        super().__init__(config, vision_dim)
        self.feed_forward = FeedForward(self.dim, config.ff_dim or config.ff_mult * self.dim, config.activation)

    def forward(self, features: Tensor) -> Tensor:
        """Return latents of the same shape, [..., W]."""
        projected = super().forward(features)
        return projected + self.feed_forward(projected)


class TransformerResampler(PerceiverResampler):
    """Attend among latents and features alike, in every layer, and return the latents (paper, table 3, "Transformer").

    Features change from layer to layer, which they do not in a perceiver resampler. The cost grows with the square of
    their number.
    """

    def forward(
        self, features: Tensor, cu_media: Tensor | None = None, frame_of_feature: Tensor | None = None
    ) -> Tensor:
        """Resample media of one shape, [M, F, S, V], to latents [M, R, W].

        Raises:
            ValueError: Media have different shapes.
        """
        if cu_media is not None:
            raise ValueError("resampler.kind transformer takes squares only: leave image_tokens out")
        num_media = len(features)
        features_MSW = self.project_frames(features).flatten(1, 2)
        num_latents = len(self.latents)
        x_MQW = torch.cat([self.latents.expand(num_media, -1, -1).to(features_MSW.dtype), features_MSW], 1)
        # A layer with the sequence as its latents and no features is plain self-attention.
        nothing = features_MSW.new_empty(0, features_MSW.shape[-1])
        cu_nothing = torch.zeros(num_media + 1, dtype=torch.int64, device=features.device)
        for layer in self.layers:
            x_MQW = layer(nothing, x_MQW, cu_nothing)
        latents_MRW: Tensor = self.norm(x_MQW[:, :num_latents])
        return latents_MRW


def build_resampler(config: PerceiverResamplerConfig, vision_dim: int) -> PerceiverResampler | LinearProjector:
    """Build what turns features of ``vision_dim`` into latents."""
    kinds: dict[str, type[PerceiverResampler] | type[LinearProjector]] = {
        "perceiver": PerceiverResampler,
        "linear": LinearProjector,
        "mlp": FeedForwardProjector,
        "transformer": TransformerResampler,
    }
    return kinds[config.kind](config, vision_dim)


def interpolate_time(embeddings_FW: Tensor, num_frames: int) -> Tensor:
    """Return time embeddings for ``num_frames`` frames, [num_frames, W].

    They are the first ones, or linearly interpolated where there are more frames than embeddings, as in the paper,
    which trains with 8 frames and evaluates with 30. The first and the last embedding keep their place.
    """
    trained = embeddings_FW.shape[0]
    if num_frames <= trained:
        return embeddings_FW[:num_frames]
    if trained == 1:
        return embeddings_FW.expand(num_frames, -1)
    longer = F.interpolate(embeddings_FW.float().T[None], size=num_frames, mode="linear", align_corners=True)
    return longer[0].T.to(embeddings_FW.dtype)


def _draw_normal(number: int, dim: int) -> Tensor:
    """Return small random vectors [number, dim], drawn on the CPU for the reason that ``Linear`` gives."""
    target = torch.empty(number, dim)
    if target.is_meta:
        return target
    return target.copy_(empty_for_drawing(number, dim).normal_(std=0.02))
