"""Resample any number of visual features of a medium to a fixed number of latents (paper, section 3.1, figure 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PerceiverResamplerConfig
from model.layers import FeedForward, Linear, empty_for_drawing
from model.ops import resampler_attention


class PerceiverAttention(nn.Module):
    """Attend from the latents of a medium to its features and to the latents; nothing is concatenated."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        """Build the projections for latents and features of ``dim`` (W)."""
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.norm_features = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.query = Linear(dim, inner)
        self.key_value = Linear(dim, 2 * inner)
        self.output = Linear(inner, dim)

    def forward(self, features_SW: Tensor, latents_MRW: Tensor, cu_media: Tensor) -> Tensor:
        """Return [M, R, W] from features of all media, one after the other, and their offsets ``cu_media`` [M + 1]."""
        latents_MRW = self.norm_latents(latents_MRW)
        q_MRHK = self.query(latents_MRW).unflatten(-1, (self.num_heads, self.head_dim))
        k_features_SHK, v_features_SHK = self._keys_values(self.norm_features(features_SW))
        k_latents_MRHK, v_latents_MRHK = self._keys_values(latents_MRW)
        out_MRHK = resampler_attention(q_MRHK, k_features_SHK, v_features_SHK, k_latents_MRHK, v_latents_MRHK, cu_media)
        return self.output(out_MRHK.flatten(-2))

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return keys, values


class PerceiverLayer(nn.Module):
    """Apply attention and feed-forward, both residual."""

    def __init__(self, dim: int, config: PerceiverResamplerConfig) -> None:
        """Build a layer for latents and features of ``dim`` (W)."""
        super().__init__()
        self.attention = PerceiverAttention(dim, config.num_heads, config.head_dim)
        self.feed_forward = FeedForward(dim, config.ff_mult, config.activation)

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
        self.time_embeddings = nn.Parameter(_draw_normal(config.num_frames, self.dim))
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
            time_FW = interpolate_time(self.time_embeddings, num_frames)
            features_SW = (self.project(features) + time_FW[:, None]).flatten(0, 2)
            cu_media = torch.arange(num_media + 1, device=features.device) * (num_frames * per_frame)
        else:
            time = self.time_embeddings[0] if frame_of_feature is None else self.time_embeddings[frame_of_feature]
            features_SW = self.project(features) + time
        latents_MRW = self.latents.expand(cu_media.numel() - 1, -1, -1)
        for layer in self.layers:
            latents_MRW = layer(features_SW, latents_MRW, cu_media)
        return self.norm(latents_MRW)


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
