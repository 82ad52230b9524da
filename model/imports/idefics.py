"""Map IDEFICS (version 1) to a Flamingo: Llama, CLIP's tower, a perceiver resampler, gated blocks with SwiGLU.

Its embeddings come in two tables, a frozen one and one for added tokens. Here the language model's table holds both,
and the two tokens that train are beside it. ``<fake_token_around_image>`` takes the place of ``<|endofchunk|>``: in
IDEFICS's data it follows every text that is followed by an image.
"""

from __future__ import annotations

from typing import Any

from transformers import IdeficsConfig, LlamaConfig

from model.config import (
    CrossAttentionConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PerceiverResamplerConfig,
    SpecialTokensConfig,
    VisionEncoderConfig,
)
from model.imports.family import Family, Layout, TableRow, check_placement, require_kinds
from model.imports.llama import block_entries
from model.imports.tensor_map import Entry, same
from model.tokens import SpecialTokenIds
from model.transformers_tower import clip_settings

_IMAGE, _FAKE = "<image>", "<fake_token_around_image>"


def idefics_layout(config: Any, image_id: int, end_of_chunk_id: int) -> Layout:
    """Return the layout of an IDEFICS.

    Args:
        config: Its ``IdeficsConfig``.
        image_id: Id of ``<image>``.
        end_of_chunk_id: Id of ``<fake_token_around_image>``.

    Raises:
        ValueError: It has no added tokens, or cross-attentions that are not evenly spaced.
    """
    if not config.vocab_size <= min(image_id, end_of_chunk_id) <= max(image_id, end_of_chunk_id) < _table(config):
        raise ValueError(
            f"the tokens {_IMAGE} (id {image_id}) and {_FAKE} (id {end_of_chunk_id}) are not among the added tokens of "
            f"this IDEFICS, whose ids are {config.vocab_size} to {_table(config) - 1}: take the tokenizer of its folder"
        )
    language_model = _llama(config)
    return Layout(
        family="IDEFICS",
        model=_settings(config),
        language_model=language_model,
        tower=clip_settings(config.vision_config),
        trained=_trained(config),
        rows=_rows(config, image_id, end_of_chunk_id),
        language_model_entries=_language_model(config, language_model),
        tower_entries=_tower(config.vision_config),
    )


def idefics_config(model: FlamingoConfig, language_model: Any, tower: Any, tokens: SpecialTokenIds) -> IdeficsConfig:
    """Return the configuration of an IDEFICS with the shape of our model.

    Args:
        model: Our settings.
        language_model: Hugging Face config of the language model.
        tower: Hugging Face config of the tower.
        tokens: Ids of the special tokens.

    Raises:
        ValueError: A part is of a kind that IDEFICS does not have.
    """
    cross, resampler = model.cross_attention, model.resampler
    require_kinds(
        "IDEFICS",
        {
            "the language model": (language_model.model_type, "llama"),
            "the tower": (tower.model_type, "clip_vision_model"),
            "resampler.kind": (resampler.kind, "perceiver"),
        },
    )
    table = max(language_model.vocab_size, 1 + max(tokens.image_id, tokens.end_of_chunk_id))
    added = table - min(tokens.image_id, tokens.end_of_chunk_id)
    return IdeficsConfig(
        vocab_size=table - added,
        additional_vocab_size=added,
        hidden_size=language_model.hidden_size,
        intermediate_size=language_model.intermediate_size,
        num_hidden_layers=language_model.num_hidden_layers,
        num_attention_heads=language_model.num_attention_heads,
        hidden_act=language_model.hidden_act,
        rms_norm_eps=language_model.rms_norm_eps,
        max_position_embeddings=language_model.max_position_embeddings,
        rope_parameters=language_model.rope_parameters,
        tie_word_embeddings=language_model.tie_word_embeddings,
        bos_token_id=language_model.bos_token_id,
        eos_token_id=language_model.eos_token_id,
        pad_token_id=language_model.pad_token_id,
        cross_layer_interval=cross.every_n_layers,
        qk_layer_norms=cross.qk_norm is not None,
        alpha_type="float" if cross.gate == "scalar" else "vector",
        use_resampler=True,
        freeze_lm_head=True,
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": resampler.num_latents,
            "resampler_depth": resampler.num_layers,
            "resampler_n_heads": resampler.num_heads,
            "resampler_head_dim": resampler.head_dim,
            "qk_layer_norms_perceiver": resampler.qk_norm is not None,
        },
        vision_config={
            "embed_dim": tower.hidden_size,
            "image_size": tower.image_size,
            "intermediate_size": tower.intermediate_size,
            "patch_size": tower.patch_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "num_channels": tower.num_channels,
            "hidden_act": tower.hidden_act,
            "layer_norm_eps": tower.layer_norm_eps,
        },
    )


IDEFICS = Family(
    "idefics",
    idefics_layout,
    idefics_config,
    image_token=_IMAGE,
    end_of_chunk=_FAKE,
    model_class="IdeficsForVisionText2Text",
    image_fit="stretch",
)


def _table(config: Any) -> int:
    return config.vocab_size + config.additional_vocab_size


def _llama(config: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_table(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _settings(config: Any) -> FlamingoConfig:
    perceiver, dim = config.perceiver_config, config.vision_config.embed_dim
    num_blocks, every = config.num_hidden_layers, config.cross_layer_interval
    if not config.use_resampler:
        raise ValueError(
            "this IDEFICS has use_resampler false: its cross-attention reads the tower's features directly, which no "
            "published IDEFICS does; such a one is not imported"
        )
    if num_blocks % every:
        raise ValueError(
            f"cross_layer_interval {every} does not divide the {num_blocks} blocks: transformers cannot run such an "
            "IDEFICS either"
        )
    every, offset = check_placement("IDEFICS", list(range(0, num_blocks, every)), num_blocks)
    return FlamingoConfig(
        vision=VisionEncoderConfig(name="", feature_norm=False, class_feature=True),
        resampler=PerceiverResamplerConfig(
            num_layers=perceiver.resampler_depth,
            dim=None,
            num_heads=perceiver.resampler_n_heads,
            head_dim=perceiver.resampler_head_dim,
            num_latents=perceiver.resampler_n_latents,
            num_frames=0,
            ff_dim=4 * dim,
            activation="relu",
            qk_norm="layer_norm" if perceiver.qk_layer_norms_perceiver else None,
        ),
        cross_attention=CrossAttentionConfig(
            every_n_layers=every,
            offset=offset,
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            qk_norm="rms_norm" if config.qk_layer_norms else None,
            ff_dim=config.intermediate_size,
            activation="swiglu",
            norm="rms_norm",
            norm_eps=config.rms_norm_eps,
            media_norm=False,
            gate="vector" if config.alpha_type == "vector" else "scalar",
        ),
        language_model=LanguageModelConfig(),
        tokens=SpecialTokensConfig(image=_IMAGE, end_of_chunk=_FAKE),
    )


def _trained(config: Any) -> list[Entry]:
    dim, hidden, width = config.hidden_size, config.intermediate_size, config.vision_config.embed_dim
    head_dim = dim // config.num_attention_heads
    gate = (1, 1, dim) if config.alpha_type == "vector" else (1,)
    entries = _resampler(config)
    for number in range(config.num_hidden_layers // config.cross_layer_interval):
        ours, theirs = f"cross_attention.{number}", f"model.gated_cross_attn_layers.{number}"
        attention = f"{theirs}.cross_attn"
        entries += [
            Entry(f"{ours}.attention_gate", (f"{theirs}.alpha_cross_attn",), (gate,), (gate[-1],)),
            Entry(f"{ours}.feed_forward_gate", (f"{theirs}.alpha_dense",), (gate,), (gate[-1],)),
            same(f"{ours}.attention.norm.weight", f"{theirs}.input_layernorm.weight", dim),
            same(f"{ours}.attention.query.weight", f"{attention}.q_proj.weight", dim, dim),
            Entry(
                f"{ours}.attention.key_value.weight",
                (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"),
                ((dim, width),) * 2,
            ),
            same(f"{ours}.attention.output.weight", f"{attention}.o_proj.weight", dim, dim),
            same(f"{ours}.feed_forward.norm.weight", f"{theirs}.post_attention_layernorm.weight", dim),
            same(f"{ours}.feed_forward.gate.weight", f"{theirs}.mlp.gate_proj.weight", hidden, dim),
            same(f"{ours}.feed_forward.up.weight", f"{theirs}.mlp.up_proj.weight", hidden, dim),
            same(f"{ours}.feed_forward.down.weight", f"{theirs}.mlp.down_proj.weight", dim, hidden),
        ]
        if config.qk_layer_norms:
            entries += [
                same(f"{ours}.attention.query_norm.weight", f"{attention}.q_layer_norm.weight", head_dim),
                same(f"{ours}.attention.key_norm.weight", f"{attention}.k_layer_norm.weight", head_dim),
            ]
    return entries


def _resampler(config: Any) -> list[Entry]:
    perceiver, dim = config.perceiver_config, config.vision_config.embed_dim
    root, inner = "model.perceiver_resampler", perceiver.resampler_n_heads * perceiver.resampler_head_dim

    def norm(ours: str, theirs: str, size: int) -> list[Entry]:
        return [same(f"{ours}.{part}", f"{theirs}.{part}", size) for part in ("weight", "bias")]

    entries = [same("resampler.latents", f"{root}.latents", perceiver.resampler_n_latents, dim)]
    entries += norm("resampler.norm", f"{root}.layer_norm", dim)
    for number in range(perceiver.resampler_depth):
        ours, attention = f"resampler.layers.{number}.attention", f"{root}.blocks.{number}.0"
        feed_forward, theirs = f"resampler.layers.{number}.feed_forward", f"{root}.blocks.{number}.1"
        entries += norm(f"{ours}.norm_features", f"{attention}.context_layer_norm", dim)
        entries += norm(f"{ours}.norm_latents", f"{attention}.latents_layer_norm", dim)
        if perceiver.qk_layer_norms_perceiver:
            entries += norm(f"{ours}.query_norm", f"{attention}.q_layer_norm", perceiver.resampler_head_dim)
            entries += norm(f"{ours}.key_norm", f"{attention}.k_layer_norm", perceiver.resampler_head_dim)
        keys_values = (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight")
        entries += [
            same(f"{ours}.query.weight", f"{attention}.q_proj.weight", inner, dim),
            Entry(f"{ours}.key_value.weight", keys_values, ((inner, dim),) * 2),
            same(f"{ours}.output.weight", f"{attention}.output_proj.weight", dim, inner),
            *norm(f"{feed_forward}.norm", f"{theirs}.ln", dim),
            same(f"{feed_forward}.up.weight", f"{theirs}.fc.weight", 4 * dim, dim),
            same(f"{feed_forward}.down.weight", f"{theirs}.c_proj.weight", dim, 4 * dim),
        ]
    return entries


def _rows(config: Any, image_id: int, end_of_chunk_id: int) -> list[TableRow]:
    tables = {"input_rows": "model.embed_tokens.additional_embedding.weight"}
    tied = config.tie_word_embeddings
    tables["output_rows"] = tables["input_rows"] if tied else "lm_head.additional_fc.weight"
    return [
        TableRow(f"language_model.{side}.{number}.weight", table, token - config.vocab_size)
        for side, table in tables.items()
        for number, token in enumerate((image_id, end_of_chunk_id))
    ]


def _language_model(config: Any, language_model: LlamaConfig) -> list[Entry]:
    dim = config.hidden_size
    shapes = ((config.vocab_size, dim), (config.additional_vocab_size, dim))
    table = ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight")
    entries = [Entry("model.embed_tokens.weight", table, shapes), same("model.norm.weight", "model.norm.weight", dim)]
    if not config.tie_word_embeddings:
        head = ("lm_head.weight", "lm_head.additional_fc.weight")
        entries.append(Entry("lm_head.weight", head, shapes))
    for number in range(config.num_hidden_layers):
        entries += block_entries(language_model, f"model.layers.{number}", f"model.layers.{number}")
    return entries


def _tower(vision: Any) -> list[Entry]:
    dim, hidden, patch = vision.embed_dim, vision.intermediate_size, vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (dim,),
        "embeddings.patch_embedding.weight": (dim, vision.num_channels, patch, patch),
        "embeddings.position_embedding.weight": ((vision.image_size // patch) ** 2 + 1, dim),
    }
    norms = ["pre_layrnorm", "post_layernorm"]  # transformers' own spelling
    for number in range(vision.num_hidden_layers):
        block = f"encoder.layers.{number}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        sizes = {f"self_attn.{name}_proj": (dim, dim) for name in ("q", "k", "v", "out")}
        sizes |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in sizes.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}
    return [same(name, f"model.vision_model.{name}", *shape) for name, shape in shapes.items()]
