"""Count the useful floating-point operations of a step, for model FLOPs utilization. A multiply-add counts as two.

A trainable matrix costs 6 per weight and token: forward, gradient of the input, gradient of the weight. A frozen matrix
that gradients pass through costs 4, a frozen one before all trainable parameters 2. Only what a token may see counts:
half of the causal square, one medium of the cross-attention, and the experts that a router sends a token to.
Recomputation is not useful work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.flamingo import Flamingo
from model.parameters import full_shape, num_weights
from model.perceiver_resampler import FeedForwardProjector, LinearProjector, TransformerResampler

# Settings of Hugging Face's configs, by what they say: experts of a block, experts of a token, kinds of the blocks.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_KINDS = ("layer_types", "layers_block_type")
# Words in the names of kinds of blocks whose cost is linear in the length of a row.
_WITHOUT_ATTENTION = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")


@dataclass(frozen=True)
class Workload:
    """Describe the part of a step that comes from one source.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of a row.
        media: Media of a row.
        num_frames: Frames of a medium.
    """

    rows: int
    tokens: int
    media: float = 1.0
    num_frames: float = 1


@dataclass(frozen=True)
class UsefulFlops:
    """Hold the sizes that decide the useful work of a model.

    Attributes:
        lm_weights: Weights of all matrices in the frozen blocks that a token meets.
        lm_attention: Sum of heads * head_dim over the blocks with softmax attention.
        head_weights: Weights of the output embedding (Z * E).
        cross_text: Weights of all cross-attentions that act on text: query, output, feed-forward.
        cross_media: Weights of all cross-attentions that act on latents: keys, values.
        cross_attention: Sum of heads * head_dim over the cross-attentions.
        num_latents: Latents of a medium, whatever its frames; 0 with a linear projector.
        num_features: Features of a frame.
        resampler_features: Weights of the resampler that act on each feature.
        resampler_latents: Weights of the resampler that act on each latent.
        resampler_attention: Sum of heads * head_dim over the resampler's layers.
        vision: Forward FLOPs of the vision tower for a frame, without tiles that only fill an image up.
        num_blocks: Blocks of the language model.
        lm_factor: FLOPs for each weight of the language model and token: 4 where it is frozen, 6 where it trains.
        features_attend: Whether the resampler's layers act on features as they do on latents.
        vision_passes: Work of the vision tower as a multiple of its forward: 1 where it is frozen, 2 with adapters, 3
            where it trains.
        latents_per_frame: Latents of a frame with a linear projector; else 0.
        features_per_patch: Features of a patch of media that keep their aspect.
    """

    lm_weights: int
    lm_attention: int
    head_weights: int
    cross_text: int
    cross_media: int
    cross_attention: int
    num_latents: int
    num_features: int
    resampler_features: int
    resampler_latents: int
    resampler_attention: int
    vision: int
    num_blocks: int
    lm_factor: int = 4
    features_attend: bool = False
    vision_passes: int = 1
    latents_per_frame: int = 0
    features_per_patch: int = 1

    @classmethod
    def of(cls, model: Flamingo) -> UsefulFlops:
        """Read the sizes of a model, which may be on the meta device or partitioned."""
        language_model, resampler = model.language_model, model.resampler
        is_linear, features_attend = isinstance(resampler, LinearProjector), isinstance(resampler, TransformerResampler)
        text_config = language_model.lm.config.get_text_config()
        blocks = list(language_model.decoder_blocks())
        cross = list(model.blocks_with_cross_attention().values())
        layers: list[Any] = list(resampler.layers)
        return cls(
            lm_weights=round(sum(_met_weights(block, text_config, index) for index, block in enumerate(blocks))),
            lm_attention=round(sum(_attention_width(text_config, index) for index in range(len(blocks)))),
            head_weights=_matrices(language_model.lm.get_output_embeddings().parameters()),
            cross_text=sum(
                _matrices([*block.attention.query.parameters(), *block.attention.output.parameters()])
                + _matrices(block.feed_forward.parameters())
                for block in cross
            ),
            cross_media=sum(_matrices(block.attention.key_value.parameters()) for block in cross),
            cross_attention=sum(block.attention.num_heads * block.attention.head_dim for block in cross),
            num_latents=0 if isinstance(resampler, LinearProjector) else full_shape(resampler.latents)[0],
            latents_per_frame=model.vision_encoder.num_features if is_linear else 0,
            features_per_patch=model.vision_encoder.features_per_patch,
            num_features=model.vision_encoder.num_features,
            resampler_features=_matrices(resampler.project.parameters())
            + (_matrices(resampler.feed_forward.parameters()) if isinstance(resampler, FeedForwardProjector) else 0)
            + sum(
                _matrices((layer if features_attend else layer.attention.key_value).parameters()) for layer in layers
            ),
            resampler_latents=sum(_matrices(layer.parameters()) for layer in layers),
            resampler_attention=sum(layer.attention.num_heads * layer.attention.head_dim for layer in layers),
            vision=model.vision_encoder.flops // (model.vision_encoder.max_tiles or 1),
            num_blocks=language_model.num_blocks,
            features_attend=features_attend,
            lm_factor=6 if model.config.trainable.language_model in ("full", "from_random") else 4,
            vision_passes={"frozen": 1, "lora": 2, "full": 3}[model.config.trainable.vision],
        )

    def parts(self, workload: Workload) -> dict[str, float]:
        """Return the FLOPs of one row, by part of the model."""
        length = workload.tokens
        keys = self.num_latents + self.latents_per_frame * workload.num_frames
        text = {
            "language_model": length * (self.lm_factor * self.lm_weights + 6 * length * self.lm_attention),
            "head": length * self.lm_factor * self.head_weights,
            "cross_attention_text": length * (6 * self.cross_text + 12 * keys * self.cross_attention),
        }
        features = workload.num_frames * self.num_features
        queries = self.num_latents + (features if self.features_attend else 0)
        resampler = (
            2 * features * self.resampler_features
            + 2 * self.num_latents * self.resampler_latents
            + 4 * queries * (features + self.num_latents) * self.resampler_attention
        )
        media = {
            "cross_attention_media": 6 * keys * self.cross_media,
            "resampler": 3 * resampler,
            "vision": workload.num_frames * self.vision * self.vision_passes,
        }
        return text | {name: workload.media * flops for name, flops in media.items()}

    def row(self, workload: Workload) -> float:
        """Return the FLOPs of one row."""
        return sum(self.parts(workload).values())

    def step(self, workloads: Iterable[Workload]) -> float:
        """Return the FLOPs of a step: all rows of all sources."""
        return sum(workload.rows * self.row(workload) for workload in workloads)


def utilization(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Return the model FLOPs utilization, 0..1.

    Args:
        flops: Useful FLOPs of all devices together.
        seconds: Time that they took.
        devices: Number of devices.
        peak: Dense FLOP/s of one device in the type of the computation.
    """
    return flops / (seconds * devices * peak)


def _met_weights(block: nn.Module, text_config: Any, index: int) -> float:
    """Count the weights of a block's matrices that a token meets: of a mixture, the experts it is sent to."""
    num_experts, used = (_first_number(text_config, names, index) for names in (_NUM_EXPERTS, _USED_EXPERTS))
    share = min(1.0, used / num_experts) if used and num_experts else 1.0
    total = 0.0
    for name, module in block.named_modules():
        if isinstance(module, nn.Embedding):  # a look-up costs nothing
            continue
        is_expert = "experts" in name.split(".")
        for parameter in module.parameters(recurse=False):
            shape = full_shape(parameter)
            stacked = len(shape) == 3 and shape[0] == num_experts and not isinstance(module, nn.Conv1d)
            total += _matrices([parameter]) * (share if is_expert or stacked else 1.0)
    return total


def _attention_width(text_config: Any, index: int) -> float:
    """Return heads * head_dim of a block, the mean of keys and values; 0 where it has no softmax attention."""
    num_heads = _first_number(text_config, ("num_attention_heads",), index)
    kinds = next((kinds for name in _KINDS if isinstance(kinds := getattr(text_config, name, None), list)), [])
    kind = str(kinds[index]) if index < len(kinds) else "attention"
    if not num_heads or any(word in kind for word in _WITHOUT_ATTENTION):
        return 0.0
    parts = [_first_number(text_config, (name,), index) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    value = _first_number(text_config, ("v_head_dim",), index)
    if all(parts) and value:  # multi-head latent attention
        return num_heads * (sum(parts) + value) / 2
    head_dim = _first_number(text_config, ("head_dim",), index)
    return num_heads * head_dim if head_dim else text_config.hidden_size // num_heads * num_heads


def _first_number(config: Any, names: Iterable[str], index: int) -> int:
    """Return the first setting that is a number, or a list with one for each block; 0 if there is none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list) and index < len(value):
            value = value[index]
        if isinstance(value, int):
            return value
    return 0


def _matrices(parameters: Iterable[nn.Parameter]) -> int:
    """Count the weights with two dimensions or more; vectors cost next to nothing."""
    return num_weights(parameter for parameter in parameters if len(full_shape(parameter)) > 1)
