"""Useful floating-point operations of an update, for model FLOPs utilization. A multiply-add is two.

What is useful (paper's sizes, [CALC] of the project's reference, section 6): a trainable matrix costs 6 per weight and
token (forward, gradient of the input, gradient of the weight); a frozen one that gradients pass through 4; a frozen
one before all trainable parameters 2. Only what a token may see counts: half of the causal square, one medium of the
cross-attention. Recomputation is not useful work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.parameters import full_shape


@dataclass(frozen=True)
class Workload:
    """One source's part of an update: that many sequences of ``tokens`` tokens, each with ``media`` media of
    ``frames`` frames."""

    sequences: int
    tokens: int
    media: float = 1.0
    frames: float = 1


@dataclass(frozen=True)
class UsefulFlops:
    """The sizes that decide the useful work of a model.

    lm_weights: weights of all matrices in the frozen blocks (N_lm). lm_attention: sum over blocks of heads * head
        width. head_weights: of the output embedding (V * D). cross_text: weights of all cross-attentions that act on
        text (N_xq: query, output, feed-forward); cross_media: on latents (N_xkv: keys, values); cross_attention: sum
        over them of heads * head width. latents: of a medium. features: of a frame. resampler_features,
        resampler_latents: weights that act on each feature and on each latent; resampler_attention: sum over its
        layers of heads * head width. vision: forward FLOPs of the tower for a frame. blocks: of the language model.
    """

    lm_weights: int
    lm_attention: int
    head_weights: int
    cross_text: int
    cross_media: int
    cross_attention: int
    latents: int
    features: int
    resampler_features: int
    resampler_latents: int
    resampler_attention: int
    vision: int
    blocks: int

    @classmethod
    def of(cls, model: Flamingo) -> UsefulFlops:
        """The sizes of a model, which may be on the meta device or partitioned. Experts of a mixture all count."""
        language_model, resampler = model.language_model, model.resampler
        text_config = language_model.lm.config.get_text_config()
        head_dim = getattr(text_config, "head_dim", None) or language_model.width // text_config.num_attention_heads
        cross = list(model.blocks_with_cross_attention().values())
        layers: list[Any] = list(resampler.layers)
        return cls(
            lm_weights=_matrices(language_model.decoder_blocks().parameters()),
            lm_attention=language_model.blocks * text_config.num_attention_heads * head_dim,
            head_weights=_matrices(language_model.lm.get_output_embeddings().parameters()),
            cross_text=sum(
                _matrices([*block.attention.query.parameters(), *block.attention.output.parameters()])
                + _matrices(block.feed_forward.parameters())
                for block in cross
            ),
            cross_media=sum(_matrices(block.attention.key_value.parameters()) for block in cross),
            cross_attention=sum(block.attention.heads * block.attention.head_dim for block in cross),
            latents=full_shape(resampler.latents)[0],
            features=model.vision_encoder.features,
            resampler_features=_matrices(resampler.project.parameters())
            + sum(_matrices(layer.attention.key_value.parameters()) for layer in layers),
            resampler_latents=sum(_matrices(layer.parameters()) for layer in layers),
            resampler_attention=sum(layer.attention.heads * layer.attention.head_dim for layer in layers),
            vision=model.vision_encoder.flops,
            blocks=language_model.blocks,
        )

    def parts(self, workload: Workload) -> dict[str, float]:
        """FLOPs of one sequence, by part of the model."""
        length = workload.tokens
        text = {
            "language_model": length * (4 * self.lm_weights + 6 * length * self.lm_attention),
            "head": length * 4 * self.head_weights,
            "cross_attention_text": length * (6 * self.cross_text + 12 * self.latents * self.cross_attention),
        }
        features = workload.frames * self.features
        resampler = (
            2 * features * self.resampler_features
            + 2 * self.latents * self.resampler_latents
            + 4 * self.latents * (features + self.latents) * self.resampler_attention
        )
        media = {
            "cross_attention_media": 6 * self.latents * self.cross_media,
            "resampler": 3 * resampler,
            "vision": workload.frames * self.vision,
        }
        return text | {name: workload.media * flops for name, flops in media.items()}

    def sequence(self, workload: Workload) -> float:
        """FLOPs of one sequence."""
        return sum(self.parts(workload).values())

    def update(self, workloads: Iterable[Workload]) -> float:
        """FLOPs of an update: all sequences of all sources."""
        return sum(workload.sequences * self.sequence(workload) for workload in workloads)


def utilization(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilization, 0..1; ``peak``: dense FLOP/s of one device in the type that is computed in."""
    return flops / (seconds * devices * peak)


def _matrices(parameters: Iterable[nn.Parameter]) -> int:
    """Weights of those with two dimensions or more; vectors cost next to nothing."""
    return sum(math.prod(shape) for parameter in parameters if len(shape := full_shape(parameter)) > 1)
