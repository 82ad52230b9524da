"""Provide the paper's three models as configs (paper, table 1 and section 3), a tiny one, and OpenFlamingo's variant.

The language models stand for Chinchilla, which is not public. Llama's architecture with a feed-forward of three times
the dim has (4 + 3 * 3) * dim^2 = 13 dim^2 weights a block. So has a block of Chinchilla: 4 attention projections, one
of relative positions, and a feed-forward of four times the dim. That reproduces the paper's 1.4, 7.1 and 70 B. The 9B's
counts fit 32 blocks with 8 cross-attentions, not the 40 and 10 of the paper's table; the preset follows the counts.
"""

from __future__ import annotations

from typing import Any

from model.config import (
    CrossAttentionConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PerceiverResamplerConfig,
    VisionEncoderConfig,
)

_VOCAB_SIZE = 32_000
_CONTEXT_LENGTH = 2048
# A head_dim of 128 (the paper's first version) gives 193.6 M weights, as in its table (194 M); 96 gives 174.7 M.
_RESAMPLER = PerceiverResamplerConfig(num_layers=6, dim=1536, num_heads=16, head_dim=128, num_latents=64, num_frames=8)
_VISION = VisionEncoderConfig(name="timm:dm_nfnet_f6", image_size=320, feature_block=-1, feature_norm=False)


def _chinchilla(num_blocks: int, dim: int, num_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": dim,
        "intermediate_size": 3 * dim,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": _CONTEXT_LENGTH,
        "tie_word_embeddings": True,
    }


def _paper(name: str, num_blocks: int, dim: int, num_heads: int, every_n_layers: int) -> FlamingoConfig:
    return FlamingoConfig(
        preset=name,
        vision=_VISION,
        resampler=_RESAMPLER,
        cross_attention=CrossAttentionConfig(every_n_layers=every_n_layers, offset=0, head_dim=128),
        language_model=LanguageModelConfig(architecture=_chinchilla(num_blocks, dim, num_heads)),
    )


def _debug() -> FlamingoConfig:
    return FlamingoConfig(
        preset="debug",
        vision=VisionEncoderConfig(name="timm:test_nfnet", image_size=64, feature_norm=False),
        resampler=PerceiverResamplerConfig(num_layers=2, dim=64, num_heads=2, head_dim=32, num_latents=8, num_frames=4),
        cross_attention=CrossAttentionConfig(every_n_layers=2, head_dim=32),
        language_model=LanguageModelConfig(architecture=_chinchilla(4, 64, 2) | {"vocab_size": 512}),
    )


_PRESETS = {
    "debug": _debug(),
    "3b": _paper("3b", 24, 2048, 16, every_n_layers=1),
    "9b": _paper("9b", 32, 4096, 32, every_n_layers=4),
    "80b": _paper("80b", 80, 8192, 64, every_n_layers=7),
}
PRESETS = tuple(_PRESETS)


def get_preset(name: str) -> FlamingoConfig:
    """Return a preset. Its language model is random and has no tokenizer, so a run replaces ``language_model``.

    Raises:
        ValueError: No preset has this name.
    """
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return _PRESETS[name]


def openflamingo(language_model: LanguageModelConfig, every_n_layers: int) -> FlamingoConfig:
    """Return OpenFlamingo's model around a language model; ``every_n_layers`` is its ``cross_attn_every_n_layers``.

    Its released checkpoints read OpenAI's CLIP features before the final norm, as open_clip gave them up to version
    2.20. OpenAI's weights need the approximate GELU, which open_clip now offers under another model name.
    """
    return FlamingoConfig(
        preset="openflamingo",
        vision=VisionEncoderConfig(name="ViT-L-14-quickgelu", pretrained="openai", feature_norm=False),
        resampler=PerceiverResamplerConfig(
            num_layers=6, dim=None, num_heads=8, head_dim=64, num_latents=64, num_frames=1, activation="gelu"
        ),
        cross_attention=CrossAttentionConfig(
            every_n_layers=every_n_layers,
            offset=every_n_layers - 1,
            num_heads=8,
            head_dim=64,
            activation="gelu",
            media_norm=False,
        ),
        language_model=language_model,
    )
