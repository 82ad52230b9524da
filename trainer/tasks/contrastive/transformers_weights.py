"""Rename the weights of open_clip's towers as transformers' CLIPModel and SiglipModel name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
_Named = Iterator[tuple[str, Tensor]]

_PREFIXES = {"text.": "text_model.", "visual.trunk.": "vision_model.", "visual.": "vision_model."}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}
_FUSED = {
    "attn.in_proj_weight": "weight",
    "attn.in_proj_bias": "bias",
    "attn.qkv.weight": "weight",
    "attn.qkv.bias": "bias",
}
_BLOCK = re.compile(r"(?:transformer\.resblocks|blocks)\.(\d+)\.(.+)")
# Outside of blocks. Position embeddings of open_clip and timm are parameters, those of transformers are tables.
_OTHER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "pos_embed": "embeddings.position_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj.weight": "head.attention.out_proj.weight",
    "attn_pool.proj.bias": "head.attention.out_proj.bias",
}
_LAYERS = {
    "ln_final": "final_layer_norm",
    "ln_pre": "pre_layrnorm",  # so spelled in transformers
    "ln_post": "post_layernorm",
    "norm": "post_layernorm",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_TEXT_NAMES = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def renamed(weights: Weights) -> dict[str, Tensor]:
    """Return the weights under the names of transformers.

    Raises:
        ValueError: A weight has no place there.
    """
    named = {f"text.{name}" if name.startswith(_TEXT_NAMES) else name: value for name, value in weights.items()}
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        found.update(_renamed(name, value, named))
    return found


def _renamed(name: str, value: Tensor, weights: Weights) -> _Named:
    """Yield the tensors that a weight becomes; the queries of an attention pool bring its keys and values."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    rest, tower = name.removeprefix(prefix), _PREFIXES.get(prefix, "")
    block, layer, kind = _BLOCK.fullmatch(rest), *_split(rest)
    if name in ("logit_scale", "logit_bias"):
        yield name, value
    elif name == "visual.proj":
        yield "visual_projection.weight", value.T
    elif name == "text.text_projection":
        yield "text_projection.weight", value.T
    elif layer == "text_projection":
        yield f"text_model.head.{kind}", value
    elif layer == "attn_pool.kv":
        return
    elif layer == "attn_pool.q":
        both = [value, weights[name.replace("attn_pool.q.", "attn_pool.kv.")]]
        yield f"{tower}head.attention.in_proj_{kind}", torch.cat(both)
    elif block is not None:
        for part, tensor in _of_block(name, block[2], value):
            yield f"{tower}encoder.layers.{block[1]}.{part}", tensor
    elif rest in _OTHER:
        is_timm = rest == "pos_embed"
        yield tower + _OTHER[rest], value[0] if is_timm else value
    elif layer in _LAYERS:
        yield f"{tower}{_LAYERS[layer]}.{kind}", value
    else:
        raise ValueError(f"transformers has no place for the weight {name}")


def _of_block(name: str, part: str, value: Tensor) -> _Named:
    if part in _FUSED:
        for letter, tensor in zip("qkv", value.chunk(3), strict=True):
            yield f"self_attn.{letter}_proj.{_FUSED[part]}", tensor
        return
    layer, kind = _split(part)
    known = _OPEN_CLIP_BLOCK | _TIMM_BLOCK
    if layer not in known:
        raise ValueError(f"transformers has no place for the weight {name}")
    yield f"{known[layer]}.{kind}", value


def _split(name: str) -> tuple[str, str]:
    layer, _, kind = name.rpartition(".")
    return layer, kind
