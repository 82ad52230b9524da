"""Describe a Flamingo as values.

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

# pydantic (in trainer.config) reads this attribute: a misspelled key is an error, not a silent default.
_FORBID_UNKNOWN_KEYS = {"extra": "forbid"}


@dataclass(frozen=True)
class VisionEncoderConfig:
    """Name the frozen image tower, which open_clip builds.

    Attributes:
        name: Name in open_clip ("ViT-L-14"), folder written by ``trainer.pretrain_vision`` ("local-dir:PATH"),
            repository ("hf-hub:OWNER/NAME") or timm model ("timm:dm_nfnet_f6").
        pretrained: Tag of open_clip or safetensors file. None takes the weights that come with ``local-dir:`` and
            ``hf-hub:``, and random weights for every other name.
        image_size: Side of the square input in pixels; None takes the tower's own.
        feature_block: Block whose output becomes the features, counted as in Python: -1 is the last one.
        feature_norm: Whether the tower's final norm is applied to the features (OpenFlamingo up to open_clip 2.20: no).
        mean: Mean of the input normalization, for pixels in 0..1; None takes the tower's own. Weights from a file need
            it where the published weights of their architecture differ in it (``ViT-L-14``).
        std: Standard deviation of the input normalization; set it together with ``mean``.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str = "ViT-L-14"
    pretrained: str | None = None
    image_size: int | None = None
    feature_block: int = -1
    feature_norm: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class PerceiverResamplerConfig:
    """Describe the resampler: any number of visual features to ``num_latents`` (paper, section 3.1 and figure 5).

    Attributes:
        num_layers: Pairs of attention and feed-forward.
        dim: Dim of the latents; None takes the dim of the vision features and leaves out the input projection.
        num_heads: Heads of the attention; ``num_heads * head_dim`` need not be ``dim``.
        head_dim: Dim of one head.
        num_latents: Latents that come out for each medium.
        num_frames: Trained time embeddings; more frames at inference interpolate them linearly.
        ff_mult: Hidden units of the feed-forward, as a multiple of ``dim``.
        activation: Activation of the feed-forward.
        final_norm: Whether a LayerNorm follows the last layer.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    num_layers: int = 6
    dim: int | None = 1536
    num_heads: int = 16
    head_dim: int = 96
    num_latents: int = 64
    num_frames: int = 8
    ff_mult: int = 4
    activation: Activation = "squared_relu"
    final_norm: bool = True


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Describe the gated cross-attention before some of the language model's blocks (paper, section 3.2, figure 4).

    Attributes:
        every_n_layers: Distance between two blocks with cross-attention: ``offset``, ``offset + every_n_layers``, ...
        offset: First block with cross-attention: 0 in the paper, ``every_n_layers - 1`` in OpenFlamingo.
        num_heads: Heads of the attention; None takes as many as fill the language model's dim (the paper).
            OpenFlamingo has 8.
        head_dim: Dim of one head (OpenFlamingo: 64).
        ff_mult: Hidden units of the feed-forward, as a multiple of the language model's dim.
        activation: Activation of the feed-forward.
        media_norm: Whether a LayerNorm on the latents precedes keys and values (the paper: yes, OpenFlamingo: no).
        attend: Media that a token sees: "one" (the paper) or "all" of its document so far (the paper's ablation).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    every_n_layers: int = 1
    offset: int = 0
    num_heads: int | None = None
    head_dim: int = 128
    ff_mult: int = 4
    activation: Activation = "squared_relu"
    media_norm: bool = True
    attend: Literal["one", "all"] = "one"


@dataclass(frozen=True)
class LanguageModelConfig:
    """Name the frozen Hugging Face causal language model.

    Attributes:
        name: Repository on the hub, or local folder, with weights and tokenizer. None builds random weights from
            ``architecture`` (benchmarks, tests, presets).
        revision: Revision on the hub: a branch, tag or commit.
        architecture: Hugging Face config as a mapping with its ``model_type``, for random weights. ZeRO-3 draws them
            in another order than stages 1 and 2, so an export of such a run fits only a run with the same stage.
        tokenizer: Repository or folder of the tokenizer; None takes ``name``.
        attention: Hugging Face's ``attn_implementation``; None leaves the choice to transformers.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    attention: str | None = None


@dataclass(frozen=True)
class SpecialTokensConfig:
    """Name the two tokens that Flamingo adds.

    Each has an input and an output embedding beside the frozen tables. In texts from data, the same characters stay
    plain text.

    Attributes:
        image: Token that stands for a medium.
        end_of_chunk: Token that ends the text of a medium (the paper's ``<EOC>``).
        train_image: Whether the embeddings of ``image`` train (OpenFlamingo) or keep their initial values (the paper).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    image: str = "<image>"
    end_of_chunk: str = "<|endofchunk|>"
    train_image: bool = True


@dataclass(frozen=True)
class FlamingoConfig:
    """Describe the whole model.

    Attributes:
        preset: Preset of ``model.presets`` that supplies the values a run's YAML leaves out. Nothing in ``model`` reads
            it.
        vision: Frozen image tower.
        resampler: Perceiver resampler.
        cross_attention: Gated cross-attention.
        language_model: Frozen language model.
        tokens: Special tokens.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    preset: str | None = None
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    resampler: PerceiverResamplerConfig = field(default_factory=PerceiverResamplerConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    tokens: SpecialTokensConfig = field(default_factory=SpecialTokensConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts, as in ``config.json`` and in YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlamingoConfig:
        """Build a config from nested dicts, the inverse of ``to_dict``; missing settings keep their defaults.

        Raises:
            ValueError: A key is not a setting.
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
                # JSON has no tuples; every setting that is a sequence is one.
                settings = {k: tuple(v) if isinstance(v, list) else v for k, v in found[name].items()}
                found[name] = section(**settings)
        return cls(**found)


def _check_keys(section: Any, values: Mapping[str, Any], prefix: str) -> None:
    known = {f.name for f in fields(section)}
    unknown = [f"{prefix}{key}" for key in values if key not in known]
    if unknown:
        raise ValueError(f"unknown settings of the model: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
