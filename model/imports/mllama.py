"""Map Llama 3.2 Vision (mllama) to a Flamingo: Llama 3.1, its own tower with tiles, a projector, gated blocks.

In transformers, a cross-attention is a block of its own among the language model's blocks. Here it stands before the
next one, so the frozen blocks are numbered without it. The embeddings have eight rows more than the head: ``<|image|>``
has an input embedding and is never predicted.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MllamaConfig

from model.config import (
    CrossAttentionConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PerceiverResamplerConfig,
    SpecialTokensConfig,
    VisionEncoderConfig,
)
from model.imports.family import CutTable, Family, Layout, TableRow, check_placement, require_kinds
from model.imports.llama import block_entries
from model.imports.tensor_map import Entry, same
from model.tokens import SpecialTokenIds

_IMAGE = "<|image|>"
_EXTRA_ROWS = 8  # of the embeddings, beyond the head's
_TEXT, _TOWER, _PROJECTOR = "model.language_model", "model.vision_model", "model.multi_modal_projector"


def mllama_layout(config: Any, image_id: int, end_of_chunk_id: int) -> Layout:
    """Return the layout of a Llama 3.2 Vision.

    Args:
        config: Its ``MllamaConfig``.
        image_id: Id of ``<|image|>``.
        end_of_chunk_id: Id of the token that ends a text.

    Raises:
        ValueError: The tokens are not where this family has them, or cross-attentions are not evenly spaced.
    """
    text = config.text_config
    if not text.vocab_size <= image_id < text.vocab_size + _EXTRA_ROWS or not 0 <= end_of_chunk_id < text.vocab_size:
        raise ValueError(
            f"{_IMAGE} has the id {image_id} and the token that ends a text {end_of_chunk_id}; in this Llama 3.2 "
            f"Vision they must lie in {text.vocab_size} to {text.vocab_size + _EXTRA_ROWS - 1} and below: take the "
            "tokenizer of its folder"
        )
    language_model = _llama(text)
    return Layout(
        family="Llama 3.2 Vision",
        model=_settings(config),
        language_model=language_model,
        tower=config.vision_config,
        trained=_trained(config),
        rows=[
            TableRow("language_model.input_rows.0.weight", f"{_TEXT}.embed_tokens.weight", image_id),
            TableRow("language_model.input_rows.1.weight", f"{_TEXT}.embed_tokens.weight", end_of_chunk_id),
            TableRow("language_model.output_rows.0.weight", "lm_head.weight", end_of_chunk_id),
        ],
        language_model_entries=_language_model(text, language_model),
        tower_entries=_tower(config.vision_config),
        cut={
            "model.embed_tokens.weight": CutTable(
                f"{_TEXT}.embed_tokens.weight", (text.vocab_size + _EXTRA_ROWS, text.hidden_size), text.vocab_size
            )
        },
    )


def mllama_config(model: FlamingoConfig, language_model: Any, tower: Any, tokens: SpecialTokenIds) -> MllamaConfig:
    """Return the configuration of a Llama 3.2 Vision with the shape of our model.

    Args:
        model: Our settings.
        language_model: Hugging Face config of the language model.
        tower: Hugging Face config of the tower.
        tokens: Ids of the special tokens.

    Raises:
        ValueError: A part is of a kind that Llama 3.2 Vision does not have.
    """
    cross, heads, dim = model.cross_attention, language_model.num_attention_heads, language_model.hidden_size
    require_kinds(
        "Llama 3.2 Vision",
        {
            "the language model": (language_model.model_type, "llama"),
            "the tower": (tower.model_type, "mllama_vision_model"),
            "resampler.kind": (model.resampler.kind, "linear"),
            "tie_word_embeddings of the language model": (language_model.tie_word_embeddings, False),
        },
    )
    blocks = language_model.num_hidden_layers
    before = list(range(cross.offset, blocks, cross.every_n_layers))
    return MllamaConfig(
        image_token_index=tokens.image_id,
        vision_config=tower.to_dict(),
        text_config={
            "vocab_size": language_model.vocab_size,
            "hidden_size": dim,
            "hidden_act": language_model.hidden_act,
            "num_hidden_layers": blocks + len(before),
            "num_attention_heads": heads,
            "num_key_value_heads": language_model.num_key_value_heads,
            "intermediate_size": language_model.intermediate_size,
            "rope_parameters": language_model.rope_parameters,
            "rms_norm_eps": language_model.rms_norm_eps,
            "max_position_embeddings": language_model.max_position_embeddings,
            "cross_attention_layers": [block + number for number, block in enumerate(before)],
            "bos_token_id": language_model.bos_token_id,
            "eos_token_id": language_model.eos_token_id,
            "pad_token_id": language_model.pad_token_id,
        },
    )


MLLAMA = Family(
    "mllama",
    mllama_layout,
    mllama_config,
    image_token=_IMAGE,
    end_of_chunk=None,
    model_class="MllamaForConditionalGeneration",
    image_fit="pad",
    published=(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", f"{_TEXT}."),
        ("vision_model.", f"{_TOWER}."),
        ("multi_modal_projector.", f"{_PROJECTOR}."),
    ),
)


def _llama(text: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers - len(text.cross_attention_layers),
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        hidden_act=text.hidden_act,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters=text.rope_parameters,
        tie_word_embeddings=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def _settings(config: Any) -> FlamingoConfig:
    text = config.text_config
    layers = sorted(text.cross_attention_layers)
    num_blocks = text.num_hidden_layers - len(layers)
    before = [layer - number for number, layer in enumerate(layers)]
    every, offset = check_placement("Llama 3.2 Vision", before, num_blocks)
    return FlamingoConfig(
        vision=VisionEncoderConfig(name="", feature_norm=False, class_feature=True),
        resampler=PerceiverResamplerConfig(kind="linear", dim=text.hidden_size),
        cross_attention=CrossAttentionConfig(
            every_n_layers=every,
            offset=offset,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            qk_norm="rms_norm",
            ff_dim=text.intermediate_size,
            activation="swiglu",
            norm="rms_norm",
            norm_eps=text.rms_norm_eps,
            media_norm=False,
            media_groups=True,
            without_media="nothing",
        ),
        language_model=LanguageModelConfig(),
        tokens=SpecialTokensConfig(image=_IMAGE, end_of_chunk="", image_output=False),
    )


def _trained(config: Any) -> list[Entry]:
    text, width = config.text_config, config.vision_config.vision_output_dim
    dim, hidden = text.hidden_size, text.intermediate_size
    head_dim = dim // text.num_attention_heads
    kv = text.num_key_value_heads * head_dim
    entries = [
        same("resampler.project.weight", f"{_PROJECTOR}.weight", dim, width),
        same("resampler.bias", f"{_PROJECTOR}.bias", dim),
    ]
    for number, layer in enumerate(sorted(text.cross_attention_layers)):
        ours, theirs = f"cross_attention.{number}", f"{_TEXT}.layers.{layer}"
        attention = f"{theirs}.cross_attn"
        keys_values = (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight")
        entries += [
            same(f"{ours}.attention_gate", f"{theirs}.cross_attn_attn_gate", 1),
            same(f"{ours}.feed_forward_gate", f"{theirs}.cross_attn_mlp_gate", 1),
            same(f"{ours}.attention.norm.weight", f"{theirs}.input_layernorm.weight", dim),
            same(f"{ours}.attention.query.weight", f"{attention}.q_proj.weight", dim, dim),
            same(f"{ours}.attention.query_norm.weight", f"{attention}.q_norm.weight", head_dim),
            same(f"{ours}.attention.key_norm.weight", f"{attention}.k_norm.weight", head_dim),
            Entry(f"{ours}.attention.key_value.weight", keys_values, ((kv, dim),) * 2),
            same(f"{ours}.attention.output.weight", f"{attention}.o_proj.weight", dim, dim),
            same(f"{ours}.feed_forward.norm.weight", f"{theirs}.post_attention_layernorm.weight", dim),
            same(f"{ours}.feed_forward.gate.weight", f"{theirs}.mlp.gate_proj.weight", hidden, dim),
            same(f"{ours}.feed_forward.up.weight", f"{theirs}.mlp.up_proj.weight", hidden, dim),
            same(f"{ours}.feed_forward.down.weight", f"{theirs}.mlp.down_proj.weight", dim, hidden),
        ]
    return entries


def _language_model(text: Any, language_model: LlamaConfig) -> list[Entry]:
    """Return the entries of the frozen blocks; the embeddings are cut apart by ``model.imports.convert``."""
    frozen = [layer for layer in range(text.num_hidden_layers) if layer not in text.cross_attention_layers]
    entries = [
        same("model.norm.weight", f"{_TEXT}.norm.weight", text.hidden_size),
        same("lm_head.weight", "lm_head.weight", text.vocab_size, text.hidden_size),
    ]
    for number, layer in enumerate(frozen):
        entries += block_entries(language_model, f"model.layers.{number}", f"{_TEXT}.layers.{layer}")
    return entries


def _tower(vision: Any) -> list[Entry]:
    dim, hidden, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    patches, kinds = (vision.image_size // patch) ** 2 + 1, len(vision.supported_aspect_ratios) + 1
    tiles = vision.max_num_tiles * dim
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (dim,),
        "patch_embedding.weight": (dim, vision.num_channels, patch, patch),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (patches, dim),
        "gated_positional_embedding.tile_embedding.weight": (kinds, tiles * patches),
    }
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        shapes |= {f"{name}.gate": (1,), f"{name}.embedding.weight": (kinds, tiles)}
    norms = ["layernorm_pre", "layernorm_post"]
    blocks = [f"transformer.layers.{number}" for number in range(vision.num_hidden_layers)]
    gated = [f"global_transformer.layers.{number}" for number in range(vision.num_global_layers)]
    for block in (*blocks, *gated):
        norms += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{block}.mlp.fc1.weight": (hidden, dim), f"{block}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{block}.mlp.fc2.weight": (dim, hidden), f"{block}.mlp.fc2.bias": (dim,)}
    shapes |= {f"{block}.{name}": (1,) for block in gated for name in ("gate_attn", "gate_ffn")}
    shapes |= {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}
    return [same(name, f"{_TOWER}.{name}", *shape) for name, shape in shapes.items()]
