"""Any number of visual features of a medium to a fixed number of latents (paper, section 3.1, figure 5).

Shape suffixes: M media, F frames, S features (of a frame, of a medium or of all media, as stated), R latents,
W width of the resampler, V width of the vision encoder, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PerceiverResamplerConfig
from model.layers import FeedForward, Linear, blank
from model.ops import resampler_attention


class PerceiverAttention(nn.Module):
    """Latents attend to the features of their medium and to themselves; nothing is concatenated."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.query = Linear(width, inner)
        self.key_value = Linear(width, 2 * inner)
        self.output = Linear(inner, width)

    def forward(self, features_SW: Tensor, latents_MRW: Tensor, cu_media: Tensor) -> Tensor:
        """features_SW: of all media, one medium after the other; cu_media: [M + 1] offsets. Returns [M, R, W]."""
        latents_MRW = self.norm_latents(latents_MRW)
        q_MRHD = self.query(latents_MRW).unflatten(-1, (self.heads, self.head_dim))
        k_features, v_features = self._keys_values(self.norm_features(features_SW))
        k_latents, v_latents = self._keys_values(latents_MRW)
        out_MRHD = resampler_attention(q_MRHD, k_features, v_features, k_latents, v_latents, cu_media)
        return self.output(out_MRHD.flatten(-2))

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(-1, (2, self.heads, self.head_dim)).unbind(-3)
        return keys, values


class PerceiverLayer(nn.Module):
    """Attention and feed-forward, both residual."""

    def __init__(self, width: int, config: PerceiverResamplerConfig) -> None:
        super().__init__()
        self.attention = PerceiverAttention(width, config.num_heads, config.head_dim)
        self.feed_forward = FeedForward(width, config.ff_mult, config.activation)

    def forward(self, features_SW: Tensor, latents_MRW: Tensor, cu_media: Tensor) -> Tensor:
        """Returns the new latents, [M, R, W]."""
        latents_MRW = latents_MRW + self.attention(features_SW, latents_MRW, cu_media)
        return latents_MRW + self.feed_forward(latents_MRW)


class PerceiverResampler(nn.Module):
    """[media, frames, features, vision width] -> [media, latents, width].

    A learned embedding is added to all features of a frame; there are no spatial ones, so any image size is allowed
    (paper, appendix A.1.1). An image is a video of one frame.
    """

    def __init__(self, config: PerceiverResamplerConfig, vision_dim: int) -> None:
        super().__init__()
        self.dim = config.dim or vision_dim
        self.num_frames = config.num_frames
        self.project: nn.Module = nn.Identity() if self.dim == vision_dim else Linear(vision_dim, self.dim)
        self.latents = nn.Parameter(_normal(config.num_latents, self.dim))
        self.time_embeddings = nn.Parameter(_normal(config.num_frames, self.dim))
        self.layers = nn.ModuleList(PerceiverLayer(self.dim, config) for _ in range(config.num_layers))
        self.norm: nn.Module = nn.LayerNorm(self.dim) if config.final_norm else nn.Identity()

    def forward(
        self, features: Tensor, cu_media: Tensor | None = None, frame_of_feature: Tensor | None = None
    ) -> Tensor:
        """Resample media of one shape, or of different lengths.

        Args:
            features: [M, F, S, V]; or, with ``cu_media``, [S, V]: those of all media, one medium after the other.
            cu_media: [M + 1] offsets into the features.
            frame_of_feature: int64 [S], only with ``cu_media``: which frame each feature is of (below the trained
                number of frames); None takes every medium for an image.

        Returns:
            [M, R, W] latents.

        Raises:
            ValueError: features of another rank than these.
        """
        if features.ndim != (4 if cu_media is None else 2):
            raise ValueError(f"features have shape {list(features.shape)}; expected [M, F, S, V], or [S, V] + cu_media")
        if cu_media is None:
            media, frames, per_frame, _ = features.shape
            time_FW = interpolate_time(self.time_embeddings, frames)
            features_SW = (self.project(features) + time_FW[:, None]).flatten(0, 2)
            cu_media = torch.arange(media + 1, device=features.device) * (frames * per_frame)
        else:
            time = self.time_embeddings[0] if frame_of_feature is None else self.time_embeddings[frame_of_feature]
            features_SW = self.project(features) + time
        latents_MRW = self.latents.expand(cu_media.numel() - 1, -1, -1)
        for layer in self.layers:
            latents_MRW = layer(features_SW, latents_MRW, cu_media)
        return self.norm(latents_MRW)


def interpolate_time(embeddings_FW: Tensor, frames: int) -> Tensor:
    """Time embeddings for ``frames`` frames: the first ones, or linearly interpolated where there are more frames than
    embeddings (the paper trains with 8 and evaluates with 30). The first and the last keep their place."""
    trained = embeddings_FW.shape[0]
    if frames <= trained:
        return embeddings_FW[:frames]
    if trained == 1:
        return embeddings_FW.expand(frames, -1)
    longer = F.interpolate(embeddings_FW.float().T[None], size=frames, mode="linear", align_corners=True)
    return longer[0].T.to(embeddings_FW.dtype)


def _normal(rows: int, width: int) -> Tensor:
    """Small random rows, drawn on the CPU for the reason that ``Linear`` gives."""
    target = torch.empty(rows, width)
    if target.is_meta:
        return target
    return target.copy_(blank(rows, width).normal_(std=0.02))
