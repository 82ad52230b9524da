"""Describe a Flamingo as values.

The models of the paper, OpenFlamingo, IDEFICS and Llama 3.2 Vision differ only in the values of these dataclasses,
never in classes. They hold no logic beyond arithmetic on their own fields, import nothing but the standard library, and
are part of the run's YAML (section ``model``), of every export (``config.json``) and of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Activation = Literal["squared_relu", "gelu", "relu", "swiglu"]
Norm = Literal["layer_norm", "rms_norm"]
DType = Literal["float32", "bfloat16", "float16"]
QuantizationMethod = Literal["int8", "nf4"]

# pydantic (in trainer.config) reads this attribute: a misspelled key is an error, not a silent default.
_FORBID_UNKNOWN_KEYS = {"extra": "forbid"}


@dataclass(frozen=True)
class VisionEncoderConfig:
    """Name the frozen image tower, which open_clip or transformers builds.

    Attributes:
        name: Name in open_clip ("ViT-L-14"), folder written by ``trainer.pretrain_vision`` ("local-dir:PATH"),
            repository ("hf-hub:OWNER/NAME"), timm model ("timm:dm_nfnet_f6"), or folder or repository of transformers
            with a CLIP, IDEFICS or Llama 3.2 Vision tower ("transformers:PATH").
        pretrained: Tag of open_clip or safetensors file. None takes the weights that come with ``local-dir:`` and
            ``hf-hub:``, and random weights for every other name.
        image_size: Side of the square input in pixels; None takes the tower's own.
        feature_block: Block whose output becomes the features, counted as in Python: -1 is the last one.
        feature_norm: Whether the tower's final norm is applied to the features (OpenFlamingo up to open_clip 2.20: no).
        mean: Mean of the input normalization, for pixels in 0..1; None takes the tower's own. Weights from a file need
            it where the published weights of their architecture differ in it (``ViT-L-14``).
        std: Standard deviation of the input normalization; set it together with ``mean``.
        architecture: Config of a transformers tower as a mapping with its ``model_type``, for random weights
            (benchmarks, tests, presets); ``name`` then only begins with "transformers:".
        class_feature: Whether the class token gives a feature too, before the patches. For ``transformers:`` only.
        padding_tiles: Whether the tiles that fill up an image give features too. Only Llama 3.2 Vision's tower has
            such tiles, and only ``cross_attention.without_media: all_media`` needs their features.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str = "ViT-L-14"
    pretrained: str | None = None
    image_size: int | None = None
    feature_block: int = -1
    feature_norm: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    architecture: dict[str, Any] | None = None
    class_feature: bool = False
    padding_tiles: bool = False


@dataclass(frozen=True)
class PerceiverResamplerConfig:
    """Describe the resampler: any number of visual features to ``num_latents`` (paper, section 3.1 and figure 5).

    Attributes:
        kind: "perceiver" (the paper); "linear" (Llama 3.2 Vision): one projection with bias, so that every feature
            becomes a latent, and only ``dim`` matters; or one of the paper's ablations. "mlp" applies a feed-forward to
            every feature, which becomes a latent. "transformer" attends among the latents and all features.
        num_layers: Pairs of attention and feed-forward.
        dim: Dim of the latents; None takes the dim of the vision features and leaves out the input projection.
        num_heads: Heads of the attention; ``num_heads * head_dim`` need not be ``dim``.
        head_dim: Dim of one head.
        num_latents: Latents that come out for each medium.
        num_frames: Trained time embeddings; more frames at inference interpolate them linearly. 0 for none (IDEFICS).
        ff_mult: Hidden units of the feed-forward, as a multiple of ``dim``.
        ff_dim: Hidden units of the feed-forward; None takes ``ff_mult * dim``.
        activation: Activation of the feed-forward.
        final_norm: Whether a LayerNorm follows the last layer.
        qk_norm: Norm of each head's queries and keys; None for none.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    kind: Literal["perceiver", "linear", "mlp", "transformer"] = "perceiver"
    num_layers: int = 6
    dim: int | None = 1536
    num_heads: int = 16
    head_dim: int = 96
    num_latents: int = 64
    num_frames: int = 8
    ff_mult: int = 4
    ff_dim: int | None = None
    activation: Activation = "squared_relu"
    final_norm: bool = True
    qk_norm: Norm | None = None


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Describe the gated cross-attention before some of the language model's blocks (paper, section 3.2, figure 4).

    Attributes:
        every_n_layers: Distance between two blocks with cross-attention: ``offset``, ``offset + every_n_layers``, ...
        offset: First block with cross-attention: 0 in the paper, ``every_n_layers - 1`` in OpenFlamingo.
        num_heads: Heads of the attention; None takes as many as fill the language model's dim (the paper).
            OpenFlamingo has 8.
        num_kv_heads: Heads of keys and values, each shared by equally many heads of queries; None takes
            ``num_heads``.
        head_dim: Dim of one head (OpenFlamingo: 64).
        qk_norm: Norm of each head's queries and keys; None for none.
        ff_mult: Hidden units of the feed-forward, as a multiple of the language model's dim.
        ff_dim: Hidden units of the feed-forward; None takes ``ff_mult`` times the language model's dim.
        activation: Activation of the feed-forward.
        norm: Norm before the queries and before the feed-forward.
        norm_eps: Epsilon of ``norm`` and of ``qk_norm``.
        media_norm: Whether a LayerNorm on the latents precedes keys and values (the paper: yes, OpenFlamingo: no).
        gate: "scalar" for one number a gate (the paper), "vector" for one for each dim of the language model, "none" to
            leave the gates out (the paper's ablation): training then does not start from the bare language model.
        attend: Media that a token sees: "one" (the paper) or "all" of its document so far (the paper's ablation).
        media_groups: Whether a token sees all media whose ``<image>`` tokens directly precede the last one's, with no
            token between (Llama 3.2 Vision). Unused where ``attend`` is "all".
        without_media: What a token with no medium before it gets. "feed_forward": nothing from the attention, but the
            feed-forward (the paper, OpenFlamingo, IDEFICS). "nothing": neither (Llama 3.2 Vision, corrected).
            "all_media": attention to all media of its row, later ones too, and no feed-forward. That is a leak, which
            transformers' code of Llama 3.2 Vision has.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    every_n_layers: int = 1
    offset: int = 0
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int = 128
    qk_norm: Norm | None = None
    ff_mult: int = 4
    ff_dim: int | None = None
    activation: Activation = "squared_relu"
    norm: Norm = "layer_norm"
    norm_eps: float = 1e-5
    media_norm: bool = True
    gate: Literal["scalar", "vector", "none"] = "scalar"
    attend: Literal["one", "all"] = "one"
    media_groups: bool = False
    without_media: Literal["feed_forward", "nothing", "all_media"] = "feed_forward"


@dataclass(frozen=True)
class LanguageModelConfig:
    """Name the frozen Hugging Face causal language model.

    Attributes:
        name: Repository on the hub, or local folder, with weights and tokenizer. None builds random weights from
            ``architecture`` (benchmarks, tests, presets).
        revision: Revision on the hub: a branch, tag or commit.
        architecture: Hugging Face config as a mapping with its ``model_type``, for random weights.
        tokenizer: Repository or folder of the tokenizer; None takes ``name``.
        attention: Hugging Face's ``attn_implementation``; None leaves the choice to transformers.
        quantization: "int8" keeps the linear layers of the frozen blocks in 8 bits, with a scale for every 128 numbers
            of a row, and "nf4" in 4 bits, with a scale for every 64 (``model.quantization``). "none" loads them as they
            are.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    name: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    attention: str | None = None
    quantization: Literal["none"] | QuantizationMethod = "none"


@dataclass(frozen=True)
class SpecialTokensConfig:
    """Name the two tokens that Flamingo adds.

    Each has an input and an output embedding beside the frozen tables. In texts from data, the same characters stay
    plain text.

    Attributes:
        image: Token that stands for a medium.
        end_of_chunk: Token that ends the text of a medium (the paper's ``<EOC>``).
        train_image: Whether the embeddings of ``image`` train (OpenFlamingo) or keep their initial values (the paper).
        image_output: Whether ``image`` has an output embedding. Without one it is never predicted (Llama 3.2 Vision).
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    image: str = "<image>"
    end_of_chunk: str = "<|endofchunk|>"
    train_image: bool = True
    image_output: bool = True


@dataclass(frozen=True)
class TrainableConfig:
    """Choose what trains. The paper trains the resampler, the cross-attention and the new tokens only.

    A part is "frozen", "full" (all of its parameters train) or "lora" (adapters beside its linear layers train).

    Attributes:
        vision: The image tower. "full" also turns on its dropout and batch statistics (the paper's fine-tuning).
        resampler: The perceiver resampler.
        cross_attention: The gated cross-attentions with their gates.
        language_model: The language model. "from_random" trains all of it from random weights (the paper's ablation).
        new_tokens: Embeddings of the added tokens; ``tokens.train_image`` decides for ``image``.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    vision: Literal["frozen", "full", "lora"] = "frozen"
    resampler: Literal["frozen", "full"] = "full"
    cross_attention: Literal["frozen", "full"] = "full"
    language_model: Literal["frozen", "full", "lora", "from_random"] = "frozen"
    new_tokens: Literal["frozen", "full"] = "full"


@dataclass(frozen=True)
class LoraConfig:
    """Configure the adapters of a part whose ``trainable`` is "lora" (arXiv:2106.09685).

    Attributes:
        rank: Rank of each adapter.
        alpha: The adapter's product is scaled by ``alpha / rank``; None takes ``rank``.
        targets: Names of the linear layers with an adapter, such as "q_proj"; None takes all in the blocks.
        dropout: Probability with which an adapter's inputs are dropped in training.
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    rank: int = 8
    alpha: int | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0

    @property
    def scale(self) -> int:
        """``alpha``, or what stands for it."""
        return self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class FlamingoConfig:
    """Describe the whole model.

    Attributes:
        preset: Preset of ``model.presets`` that supplies the values a run's YAML leaves out. Nothing in ``model`` reads
            it.
        start_from: Export folder, from ``trainer.export`` or ``trainer.import_model``. It supplies the values a run's
            YAML leaves out, and the weights that training starts with. None draws them.
        vision: Frozen image tower.
        resampler: Perceiver resampler.
        cross_attention: Gated cross-attention.
        language_model: Frozen language model.
        tokens: Special tokens.
        trainable: Parts that train.
        language_model_lora: Adapters of the language model, if ``trainable.language_model`` is "lora".
        vision_lora: Adapters of the image tower, if ``trainable.vision`` is "lora".
    """

    __pydantic_config__ = _FORBID_UNKNOWN_KEYS

    preset: str | None = None
    start_from: str | None = None
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    resampler: PerceiverResamplerConfig = field(default_factory=PerceiverResamplerConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    tokens: SpecialTokensConfig = field(default_factory=SpecialTokensConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    language_model_lora: LoraConfig = field(default_factory=LoraConfig)
    vision_lora: LoraConfig = field(default_factory=LoraConfig)

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
            "trainable": TrainableConfig,
            "language_model_lora": LoraConfig,
            "vision_lora": LoraConfig,
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
