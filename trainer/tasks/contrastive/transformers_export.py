"""Write an export of towers as transformers' CLIPModel or SiglipModel, with its processor, where these exist.

A CLIPModel is a pair of open_clip's own transformers. A SiglipModel has timm's ViT with attention pooling, and a text
tower that is not causal. The features of both models are compared before anything is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from model.loading_errors import explain_loading
from trainer.tasks.contrastive.architecture import WEIGHTS, build_clip
from trainer.tasks.contrastive.transformers_weights import renamed

TOLERANCE = 1e-5  # of normalized features
_CLIP_VOCABULARY = 49408
_ARGMAX = 2  # an end token for which transformers takes the position of the largest id, as open_clip does
_SPECIAL_TOKENS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's names
# Settings of open_clip that neither model has, and the value that leaves them out.
_LEFT_OUT = {
    "ls_init_value": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "embed_cls": False,
    "attentional_pool": False,
    "no_ln_pre": False,
}


class NotInTransformersError(ValueError):
    """Report that transformers has no model for a pair of towers."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(
            "--format huggingface: transformers has no model for these towers: " + "; ".join(reasons) + ". Use the "
            "format open_clip"
        )


@dataclass(frozen=True)
class Preparation:
    """Say how a run prepares its pairs.

    Attributes:
        tokenizer: Folder of the captions' tokenizer; None is open_clip's own.
        image_fit: ``data.image_fit``.
    """

    tokenizer: Path | None = None
    image_fit: str = "crop"


def write_transformers(export: Path, output: Path, preparation: Preparation) -> None:
    """Write a folder that ``AutoModel`` and ``AutoProcessor`` load.

    Args:
        export: Folder that open_clip loads as ``local-dir:``.
        output: Folder to write.
        preparation: How the run prepared its pairs.

    Raises:
        NotInTransformersError: transformers has no such towers.
        ValueError: There is no tokenizer.
    """
    settings = json.loads((export / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    clip = build_clip(export).eval()
    is_siglip = settings["vision_cfg"].get("timm_model_name") is not None
    reasons = list(_siglip_reasons(settings, clip) if is_siglip else _clip_reasons(settings, clip))
    if reasons:
        raise NotInTransformersError(reasons)
    weights = load_file(export / WEIGHTS)
    clip.load_state_dict(weights)
    model = SiglipModel(_siglip_config(settings, clip)) if is_siglip else CLIPModel(_clip_config(settings, clip))
    _load(model, weights)
    _check_features(clip, model.eval())
    tokenizer = _tokenizer(settings, preparation, int(clip.context_length))
    model.save_pretrained(output)
    _processor(clip, tokenizer, preparation.image_fit, is_siglip).save_pretrained(output)


def _clip_reasons(settings: Mapping[str, Any], clip: Any) -> Iterator[str]:
    yield from _common_reasons(settings)
    vision, text = CLIPVisionCfg(**settings["vision_cfg"]), CLIPTextCfg(**settings["text_cfg"])
    if not isinstance(vision.layers, int):
        yield "vision_cfg.layers describes a ResNet"
    if vision.pool_type != "tok":
        yield f"vision_cfg.pool_type is {vision.pool_type}, and a CLIPModel takes the class token (tok)"
    if text.no_causal_mask:
        yield "text_cfg.no_causal_mask is true, and the text tower of a CLIPModel is causal"
    if text.pool_type not in ("argmax", "eos") or (text.pool_type == "eos" and text.eos_id == _ARGMAX):
        yield f"text_cfg.pool_type is {text.pool_type}, and a CLIPModel takes the end token (argmax)"
    if text.proj_bias or text.proj_type != "linear":
        yield "text_cfg.proj_bias or proj_type is not that of a CLIPModel"
    if getattr(clip, "logit_bias", None) is not None:
        yield "the logits have a bias (loss.kind sigmoid, or init_logit_bias), and those of a CLIPModel have none"


def _siglip_reasons(settings: Mapping[str, Any], clip: Any) -> Iterator[str]:
    yield from _common_reasons(settings)
    vision, text = CLIPVisionCfg(**settings["vision_cfg"]), CLIPTextCfg(**settings["text_cfg"])
    if not hasattr(clip.visual.trunk, "blocks") or vision.timm_pool != "map" or vision.timm_proj not in ("none", ""):
        name = vision.timm_model_name
        yield f"timm's {name} is no ViT with attention pooling and without projection (timm_pool map, timm_proj none)"
    if not text.no_causal_mask or text.pool_type != "last" or not text.proj_bias:
        yield "the text tower of a SiglipModel has no_causal_mask, pool_type last and proj_bias"
    if getattr(clip, "logit_bias", None) is None:
        yield "the logits have no bias, and those of a SiglipModel have one"


def _common_reasons(settings: Mapping[str, Any]) -> Iterator[str]:
    if "hf_model_name" in settings["text_cfg"]:
        yield "the text tower is an encoder of transformers (text_cfg.hf_model_name)"
    for section in ("vision_cfg", "text_cfg"):
        for name, value in settings[section].items():
            if name in _LEFT_OUT and value != _LEFT_OUT[name]:
                yield f"{section}.{name} is {value}"


def _clip_config(settings: Mapping[str, Any], clip: Any) -> CLIPConfig:
    vision, text = CLIPVisionCfg(**settings["vision_cfg"]), CLIPTextCfg(**settings["text_cfg"])
    act = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    tower = {
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "image_size": _side(vision.image_size),
        "patch_size": vision.patch_size,
        "hidden_act": act,
        "layer_norm_eps": clip.visual.ln_post.eps,
    }
    end = {"eos_token_id": _ARGMAX if text.pool_type == "argmax" else text.eos_id}
    texts = _text_tower(text) | {"hidden_act": act, "layer_norm_eps": _text(clip).ln_final.eps} | end
    shared = {"projection_dim": settings["embed_dim"]}
    return CLIPConfig(text_config=texts | shared, vision_config=tower | shared, **shared)


def _siglip_config(settings: Mapping[str, Any], clip: Any) -> SiglipConfig:
    vision, text, trunk = settings["vision_cfg"], CLIPTextCfg(**settings["text_cfg"]), clip.visual.trunk
    tower = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": trunk.blocks[0].attn.num_heads,
        "image_size": _side(vision.get("image_size", 224)),
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": _activation(trunk.blocks[0].mlp.act),
        "layer_norm_eps": trunk.norm.eps,
    }
    tower_of_text = clip.text
    act = _activation(tower_of_text.transformer.resblocks[0].mlp.gelu)
    texts = _text_tower(text) | {"hidden_act": act, "layer_norm_eps": tower_of_text.ln_final.eps}
    return SiglipConfig(text_config=texts | {"projection_size": settings["embed_dim"]}, vision_config=tower)


def _text_tower(text: CLIPTextCfg) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
    }


def _activation(module: nn.Module) -> str:
    return "gelu_pytorch_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _text(clip: Any) -> Any:
    """Return the text tower; the class CLIP of open_clip is its own."""
    return clip if isinstance(clip, open_clip.CLIP) else clip.text


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        named = renamed(weights)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        for name in named.keys() & {"logit_scale", "logit_bias"}:
            named[name] = named[name].reshape(shapes[name])
        model.load_state_dict(named)
    except (ValueError, RuntimeError) as error:
        raise NotInTransformersError([str(error)]) from error


def _check_features(clip: Any, model: Any) -> None:
    """Check that both models have the same features of random inputs.

    Raises:
        NotInTransformersError: They differ.
    """
    generator = torch.Generator().manual_seed(0)
    size = _side(model.config.vision_config.image_size)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(3, _text(clip).vocab_size, (2, int(clip.context_length)), generator=generator)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels)
        pairs = (
            (clip.encode_image(pixels, normalize=True), theirs.image_embeds),
            (clip.encode_text(ids, normalize=True), theirs.text_embeds),
        )
    for tower, (own, other) in zip(("image", "text"), pairs, strict=True):
        error = float((own - other).abs().max())
        if error > TOLERANCE:
            raise NotInTransformersError([f"the features of the {tower} tower differ by {error:.1e}"])


def _tokenizer(settings: Mapping[str, Any], preparation: Preparation, context: int) -> PreTrainedTokenizerBase:
    if preparation.tokenizer is not None:
        with explain_loading(f"tokenizer {str(preparation.tokenizer)!r}"):
            tokenizer = AutoTokenizer.from_pretrained(preparation.tokenizer, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.eos_token  # as the trainer pads captions
        tokenizer.model_max_length = context
        return tokenizer
    if settings["text_cfg"].get("vocab_size", _CLIP_VOCABULARY) != _CLIP_VOCABULARY:
        raise ValueError(
            "--format huggingface: an export does not say what its tokenizer is; name the run folder instead, whose "
            "config.yaml does"
        )
    own = open_clip.get_tokenizer("ViT-B-32", context_length=context)
    merges = sorted(own.bpe_ranks, key=lambda pair: own.bpe_ranks[pair])
    vocabulary = {_SPECIAL_TOKENS.get(token, token): number for token, number in own.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context)


def _processor(
    clip: Any, tokenizer: PreTrainedTokenizerBase, image_fit: str, is_siglip: bool
) -> CLIPProcessor | SiglipProcessor:
    statistics = open_clip.get_model_preprocess_cfg(clip)
    side = _side(clip.visual.image_size)
    square = {"height": side, "width": side}
    common = {"image_mean": list(statistics["mean"]), "image_std": list(statistics["std"])}
    if image_fit == "pad":
        print("the processor crops images that are no squares; training padded them", file=sys.stderr)
    if is_siglip:
        if image_fit == "crop":
            print("the processor stretches images that are no squares; training cropped them", file=sys.stderr)
        return SiglipProcessor(SiglipImageProcessor(size=square, **common), tokenizer)
    if image_fit == "stretch":
        return CLIPProcessor(CLIPImageProcessor(size=square, do_center_crop=False, **common), tokenizer)
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **common)
    return CLIPProcessor(images, tokenizer)
