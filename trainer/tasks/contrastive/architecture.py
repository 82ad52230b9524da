"""Build a pair of towers from open_clip's model config, without weights and without the hub.

The image tower may be open_clip's or timm's, the text tower open_clip's or a Hugging Face encoder. A folder with
``open_clip_config.json`` describes them; open_clip loads it as ``local-dir:``.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.factory import load_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from model.loading_errors import explain_loading
from trainer.config.run_config import ContrastiveRunConfig

WEIGHTS = "open_clip_model.safetensors"
_CONFIG = "open_clip_config.json"
_CLIP_PREFIX = "clip."  # of the weights of ContrastiveTowers in a checkpoint
_DEFAULT_CONTEXT = 77  # tokens, open_clip's


def model_settings(config: ContrastiveRunConfig) -> dict[str, Any]:
    """Return open_clip's model config, with what other settings say about it.

    Raises:
        ValueError: open_clip does not know the architecture's name.
    """
    if isinstance(config.architecture, dict):
        settings = deepcopy(config.architecture)
        settings.pop("preprocess_cfg", None)
    else:
        known = open_clip.get_model_config(config.architecture)
        if known is None:
            message = f"open_clip has no model {config.architecture!r}; see open_clip.list_models()"
            raise ValueError(f"architecture: {message}")
        settings = deepcopy(dict(known))
    if config.image_size is not None:
        settings["vision_cfg"]["image_size"] = config.image_size
    if config.loss.kind == "sigmoid":  # the starting values of SigLIP's paper
        settings.setdefault("init_logit_scale", 2.302585092994046)
        settings.setdefault("init_logit_bias", -10.0)
    return settings


def image_size(config: ContrastiveRunConfig) -> int:
    """Return the side of the tower's square input, in pixels."""
    size = model_settings(config)["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def context_length(config: ContrastiveRunConfig, clip: Any) -> int:
    """Return the tokens of a caption. open_clip gives a Hugging Face tower all positions that it has."""
    text = model_settings(config)["text_cfg"]
    if "hf_model_name" not in text:
        return int(clip.context_length)
    return min(int(text.get("context_length", _DEFAULT_CONTEXT)), int(clip.context_length))


def write_architecture(config: ContrastiveRunConfig, folder: Path) -> None:
    """Write the folder that open_clip loads as ``local-dir:``, without weights.

    Raises:
        ValueError: The architecture is not known, or a part of it cannot be read.
    """
    settings = model_settings(config)
    folder.mkdir(parents=True, exist_ok=True)
    text = settings["text_cfg"]
    if "hf_model_name" in text:
        _write_text_tower(config, text["hf_model_name"], folder)
        text.setdefault("context_length", _DEFAULT_CONTEXT)
    _write_config(folder, {"model_cfg": settings, "preprocess_cfg": _statistics(config, settings)}, folder)


def _write_text_tower(config: ContrastiveRunConfig, name: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with explain_loading(f"architecture.text_cfg.hf_model_name {name!r}"):
        AutoConfig.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)
    if config.tokenizer is not None:
        with explain_loading(f"tokenizer {str(config.tokenizer)!r}"):
            AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False).save_pretrained(folder)


def _write_config(folder: Path, description: dict[str, Any], named: Path) -> None:
    """Write ``open_clip_config.json``.

    A Hugging Face text tower has its config and its tokenizer in the same folder. open_clip names it by an absolute
    path: that of ``named``, which the folder will have.
    """
    text = description["model_cfg"]["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(named.absolute())
    (folder / _CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _statistics(config: ContrastiveRunConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return mean and standard deviation of the input: the architecture's, or timm's; {} leaves open_clip's own."""
    if isinstance(config.architecture, dict) and "preprocess_cfg" in config.architecture:
        return dict(config.architecture["preprocess_cfg"])
    name = settings["vision_cfg"].get("timm_model_name")
    if name is None:
        return {}
    preset = timm.get_pretrained_cfg(name)
    if preset is None:
        raise ValueError(f"architecture.vision_cfg.timm_model_name: timm has no model {name!r}; see timm.list_models()")
    return {"mean": list(preset.mean), "std": list(preset.std)}


def build_clip(folder: Path, device: str = "cpu") -> Any:
    """Build open_clip's model with random weights from a folder of ``write_architecture``."""
    return open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_text=False, pretrained_image=False, device=device
    )


def load_weights(clip: nn.Module, export: Path) -> None:
    """Load the weights of an export; the position embeddings of open_clip's towers are interpolated to this size.

    Raises:
        ValueError: There are no weights, or they do not fit the architecture.
    """
    file = export / WEIGHTS
    if not file.is_file():
        raise ValueError(f"start_from: no such file: {file}; name the export of a run of trainer.pretrain_vision")
    try:
        load_checkpoint(clip, str(file), strict=True)
    except RuntimeError as error:
        raise ValueError(f"start_from: the weights of {export} do not fit the architecture: {error}") from error


def write_export(architecture: Path, weights: dict[str, Tensor], folder: Path, output: Path) -> None:
    """Write a folder that open_clip loads as ``local-dir:``.

    Args:
        architecture: Folder of ``write_architecture``.
        weights: Weights of ``ContrastiveTowers``.
        folder: Folder to write.
        output: Place that the folder will have.
    """
    shutil.copytree(architecture, folder, dirs_exist_ok=True)
    shapes = {name: tensor.shape for name, tensor in build_clip(architecture, "meta").state_dict().items()}
    _write_config(folder, json.loads((architecture / _CONFIG).read_text(encoding="utf-8")), output)
    named = {name.removeprefix(_CLIP_PREFIX): tensor for name, tensor in weights.items()}
    save_file({name: value.reshape(shapes[name]).contiguous() for name, value in named.items()}, folder / WEIGHTS)
