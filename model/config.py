"""What a Flamingo is made of, as values.

The paper's model and OpenFlamingo's differ only in the values of these dataclasses, never in classes. They hold no
logic beyond arithmetic on their own fields, import nothing but the standard library, and are part of the run's YAML
(section ``model``), of every export (``config.json``) and of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Activation = Literal["squared_relu", "gelu"]
DType = Literal["float32", "bfloat16", "float16"]

# pydantic (in trainer.config) reads this attribute: a misspelt key is an error, not a silent default.
_FORBID_UNKNOWN_KEYS = {"extra": "forbid"}


@dataclass(frozen=True)
class VisionEncoderConfig:
    """A frozen open_clip image tower.

    name: an open_clip model ("ViT-L-14"), a folder written by ``trainer.pretrain_vision`` or a Hugging Face repository
        in open_clip's own notation ("local-dir:PATH", "hf-hub:OWNER/NAME"), or a timm model through open_clip
        ("timm:dm_nfnet_f6").
    pretrained: open_clip's tag or a safetensors file; None takes what ``local-dir:`` / ``hf-hub:`` bring, and random
        weights for every other name.
    image_size: side in pixels of the square input; None takes the tower's own.
    feature_block: which block's output is used, counted as in Python (-1 the last, -2 the one before).
    feature_norm: whether the tower's final norm is applied to the features (OpenFlamingo up to open_clip 2.20: no).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str = "ViT-L-14"
    pretrained: str | None = None
    image_size: int | None = None
    feature_block: int = -1
    feature_norm: bool = True


@dataclass(frozen=True)
class PerceiverResamplerConfig:
    """Any number of visual features to ``latents`` tokens (paper, section 3.1 and figure 5).

    layers: attention and feed-forward pairs. heads, head_width: of the attention; their product need not be ``width``.
    width: width of the latents; None takes the vision features' own (then there is no input projection).
    latents: tokens that come out for each medium.
    frames: number of trained temporal embeddings; more frames at inference interpolate them linearly.
    feed_forward_multiplier: hidden width of the feed-forward, in widths. activation: its non-linearity.
    final_norm: a LayerNorm on the output latents.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    layers: int = 6
    width: int | None = 1536
    heads: int = 16
    head_width: int = 96
    latents: int = 64
    frames: int = 8
    feed_forward_multiplier: int = 4
    activation: Activation = "squared_relu"
    final_norm: bool = True


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Gated cross-attention before some of the language model's blocks (paper, section 3.2 and figure 4).

    every, offset: before blocks ``offset, offset + every, ...``. The paper's is offset 0; OpenFlamingo's
        ``(i + 1) % n == 0`` is offset n - 1.
    heads, head_width: None heads are as many as fill the language model's width (the paper); OpenFlamingo fixes 8 x 64.
    feed_forward_multiplier: hidden width of the feed-forward, in widths. activation: its non-linearity.
    media_norm: a LayerNorm on the latents before keys and values (the paper: yes, OpenFlamingo: no).
    attend: "one" medium (phi of the paper) or "all" media of the document so far (its ablation).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    every: int = 1
    offset: int = 0
    heads: int | None = None
    head_width: int = 128
    feed_forward_multiplier: int = 4
    activation: Activation = "squared_relu"
    media_norm: bool = True
    attend: Literal["one", "all"] = "one"


@dataclass(frozen=True)
class LanguageModelConfig:
    """A frozen Hugging Face causal language model.

    name: a repository on the hub or a local folder (weights and tokenizer); None builds random weights from
        ``architecture``, a Hugging Face config as a mapping with its ``model_type`` (benchmarks, tests, presets).
        ZeRO-3 draws them in another order: such a run's export only fits a run like it.
    revision: the hub's revision (branch, tag or commit).
    tokenizer: where the tokenizer is, if not at ``name``.
    attention: Hugging Face's ``attn_implementation``; None takes its choice (sdpa where the family has it).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    attention: str | None = None


@dataclass(frozen=True)
class SpecialTokensConfig:
    """The two tokens that Flamingo adds; each has an input and an output row of its own beside the frozen tables.

    image, end_of_chunk: how they are written; in texts from data these characters stay plain text.
    train_image: whether the rows of ``image`` are trained (OpenFlamingo) or stay at their start (the paper trains
        only ``<EOC>``).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    image: str = "<image>"
    end_of_chunk: str = "<|endofchunk|>"
    train_image: bool = True


@dataclass(frozen=True)
class FlamingoConfig:
    """The whole model. ``preset`` names what it was derived from, for people; it changes nothing."""

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    preset: str | None = None
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    resampler: PerceiverResamplerConfig = field(default_factory=PerceiverResamplerConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    tokens: SpecialTokensConfig = field(default_factory=SpecialTokensConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as they stand in ``config.json`` and in YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlamingoConfig:
        """The opposite of ``to_dict``; what is left out keeps its default.

        Raises:
            ValueError: a key that is not a setting.
        """
        sections: dict[str, Any] = {
            "vision": VisionEncoderConfig,
            "resampler": PerceiverResamplerConfig,
            "cross_attention": CrossAttentionConfig,
            "language_model": LanguageModelConfig,
            "tokens": SpecialTokensConfig,
        }
        _check_keys(cls, values, "")
        found = dict(values)
        for name, section in sections.items():
            if name in found:
                _check_keys(section, found[name], f"{name}.")
                found[name] = section(**found[name])
        return cls(**found)


def _check_keys(section: Any, values: Mapping[str, Any], prefix: str) -> None:
    known = {f.name for f in fields(section)}
    unknown = [f"{prefix}{key}" for key in values if key not in known]
    if unknown:
        raise ValueError(f"unknown settings of the model: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
