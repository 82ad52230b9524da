"""Provide models as configs: the paper's three (table 1 and section 3), a tiny one, and published ones by their names.

The published ones are OpenFlamingo-3B, -4B and -9B, IDEFICS-9B and Llama-3.2-11B-Vision. Their weights come from
``trainer.import_model``, whose export ``model.start_from`` names.

The language models stand for Chinchilla, which is not public. Llama's architecture with a feed-forward of three times
the dim has (4 + 3 * 3) * dim^2 = 13 dim^2 weights a block. So has a block of Chinchilla: 4 attention projections, one
of relative positions, and a feed-forward of four times the dim. That reproduces the paper's 1.4, 7.1 and 70 B. The 9B's
counts fit 32 blocks with 8 cross-attentions, not the 40 and 10 of the paper's table; the preset follows the counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.config import (
    CrossAttentionConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PerceiverResamplerConfig,
    SpecialTokensConfig,
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


def _openflamingo(name: str, architecture: dict[str, Any], every_n_layers: int) -> FlamingoConfig:
    return replace(openflamingo(LanguageModelConfig(architecture=architecture), every_n_layers), preset=name)


def _mpt(num_blocks: int, dim: int, num_heads: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "mpt",
        "d_model": dim,
        "n_heads": num_heads,
        "n_layers": num_blocks,
        "vocab_size": vocab_size,
        "max_seq_len": _CONTEXT_LENGTH,
    }


_REDPAJAMA_3B = {
    "model_type": "gpt_neox",
    "vocab_size": 50_432,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10_240,
    "use_parallel_residual": False,
    "rotary_pct": 1.0,
    "max_position_embeddings": _CONTEXT_LENGTH,
}
_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": _CONTEXT_LENGTH,
}
_LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_CLIP_H = {
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
# The sizes that transformers' MllamaVisionConfig has by default are those of the published towers, except for the side.
_MLLAMA_TOWER = {"model_type": "mllama_vision_model", "image_size": 448}
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _transformers_tower(name: str, architecture: dict[str, Any]) -> VisionEncoderConfig:
    return VisionEncoderConfig(
        name=f"transformers:{name}",
        architecture=architecture,
        feature_norm=False,
        class_feature=True,
        mean=_OPENAI_MEAN,
        std=_OPENAI_STD,
    )


def _idefics_9b() -> FlamingoConfig:
    return FlamingoConfig(
        preset="idefics-9b",
        vision=_transformers_tower("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _CLIP_H),
        resampler=PerceiverResamplerConfig(
            num_layers=6, dim=None, num_heads=16, head_dim=96, num_latents=64, num_frames=0, activation="relu"
        ),
        cross_attention=CrossAttentionConfig(
            every_n_layers=4,
            num_heads=32,
            ff_dim=11_008,
            activation="swiglu",
            norm="rms_norm",
            norm_eps=1e-6,
            media_norm=False,
        ),
        language_model=LanguageModelConfig(architecture=_LLAMA_7B),
        tokens=SpecialTokensConfig(image="<image>", end_of_chunk="<fake_token_around_image>"),
    )


def _llama_vision_11b() -> FlamingoConfig:
    return FlamingoConfig(
        preset="llama-3.2-11b-vision",
        vision=_transformers_tower("meta-llama/Llama-3.2-11B-Vision", _MLLAMA_TOWER),
        resampler=PerceiverResamplerConfig(kind="linear", dim=4096),
        cross_attention=CrossAttentionConfig(
            every_n_layers=4,
            offset=3,
            num_heads=32,
            num_kv_heads=8,
            qk_norm="rms_norm",
            ff_dim=14_336,
            activation="swiglu",
            norm="rms_norm",
            media_norm=False,
            media_groups=True,
            without_media="nothing",
        ),
        language_model=LanguageModelConfig(architecture=_LLAMA_3_8B),
        tokens=SpecialTokensConfig(image="<|image|>", end_of_chunk="<|end_of_text|>", image_output=False),
    )


_PRESETS = {
    "debug": _debug(),
    "3b": _paper("3b", 24, 2048, 16, every_n_layers=1),
    "9b": _paper("9b", 32, 4096, 32, every_n_layers=4),
    "80b": _paper("80b", 80, 8192, 64, every_n_layers=7),
    "openflamingo-3b": _openflamingo("openflamingo-3b", _mpt(24, 2048, 16, 50_432), every_n_layers=1),
    "openflamingo-4b": _openflamingo("openflamingo-4b", _REDPAJAMA_3B, every_n_layers=2),
    "openflamingo-9b": _openflamingo("openflamingo-9b", _mpt(32, 4096, 32, 50_432), every_n_layers=4),
    "idefics-9b": _idefics_9b(),
    "llama-3.2-11b-vision": _llama_vision_11b(),
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
