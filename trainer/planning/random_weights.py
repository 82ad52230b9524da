"""Build the model of a configuration without its pretrained weights, for planning and benchmarks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from model.config import DType, FlamingoConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.presets import PRESETS, get_preset
from model.tokens import SpecialTokenIds


def with_random_weights(config: FlamingoConfig) -> FlamingoConfig:
    """Return the same model with random weights, so that nothing is downloaded.

    The architecture of a named language model comes from its local folder, or else from ``model.preset``.

    Raises:
        ValueError: The language model is not in a local folder, and there is no preset.
    """
    language_model = config.language_model
    if language_model.name is not None:
        if (Path(language_model.name) / "config.json").is_file():
            from transformers import AutoConfig

            architecture = AutoConfig.from_pretrained(language_model.name, local_files_only=True).to_dict()
        elif config.preset in PRESETS:
            architecture = copy.deepcopy(get_preset(config.preset).language_model.architecture)
        else:
            raise ValueError(
                f"model.language_model.name {language_model.name!r} is not a local folder with a config.json, and the "
                "hub is not asked: set model.language_model.architecture (and name to null), or model.preset"
            )
        language_model = replace(language_model, name=None, revision=None, architecture=architecture)
    name = config.vision.name
    pretrained = None if not name.startswith(("local-dir:", "hf-hub:")) else config.vision.pretrained
    return replace(config, language_model=language_model, vision=replace(config.vision, pretrained=pretrained))


def synthetic_tokens(config: FlamingoConfig) -> SpecialTokenIds:
    """Return ids for the special tokens, which follow the vocabulary of a config from ``with_random_weights``."""
    from transformers import AutoConfig

    architecture = dict(config.language_model.architecture or {})
    text = AutoConfig.for_model(architecture.pop("model_type"), **architecture).get_text_config()
    return SpecialTokenIds(text.vocab_size, text.vocab_size + 1, bos_id=1, eos_id=2, pad_id=0)


def build_on_meta_device(config: FlamingoConfig, dtype: DType = "float32") -> Flamingo:
    """Build the model on the meta device, where tensors have shapes and take no memory.

    Raises:
        ValueError: The architecture is unknown, as in ``with_random_weights``.
    """
    config = with_random_weights(config)
    with torch.device("meta"):
        return build_flamingo(config, synthetic_tokens(config), dtype=dtype)
