"""Write an export whose adapters are merged into the weights of their layers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.factory import build_flamingo
from model.lora import LORA, merge_adapters
from model.parameters import explain_difference, frozen_digests, trainable_parameters
from model.pretrained import (
    SOURCE,
    ExportDescription,
    cast_parameters,
    describe_export,
    load_exported_tokenizer,
    load_trained,
    read_trained,
    save_pretrained,
)
from model.processor import ProcessorConfig, read_processor_config

_PREFIXES = {"language_model": "language_model.lm.", "vision": "vision_encoder."}


def write_merged(export: Path, folder: Path) -> None:
    """Write an export that computes the same without adapters. The merged parts are in it, whole and in float32.

    Args:
        export: Export with adapters.
        folder: Folder to write.

    Raises:
        ValueError: There are no adapters, the weights under them are quantized, or they are not those of the training.
    """
    described = describe_export(export)
    modes = {part: getattr(described.config.trainable, part) for part in _PREFIXES}
    merged = [part for part, mode in modes.items() if mode == "lora"]
    if not merged:
        found = ", ".join(f"model.trainable.{part} is {mode}" for part, mode in modes.items())
        raise ValueError(f"{export} has no adapters to merge: {found}; leave --merge-adapters out")
    state = _merged_state(export, described, merged)
    trainable = described.config.trainable
    if "language_model" in merged:
        trainable = replace(trainable, language_model="full")
    if "vision" in merged:
        trainable = replace(trainable, vision="full")
    config = replace(described.config, trainable=trainable)
    model = build_flamingo(config, described.tokens, dtype=described.dtype, seed=described.seed)
    frozen = frozen_digests(model)
    load_trained(model, state)  # the names and shapes fit, or this raises
    save_pretrained(
        folder,
        state,
        config,
        tokens=described.tokens,
        dtype=described.dtype,
        frozen=frozen,
        processor=read_processor_config(export) or ProcessorConfig.of(model.vision_encoder),
        seed=described.seed,
        tokenizer=load_exported_tokenizer(export).tokenizer,
    )
    if (export / SOURCE).is_dir():
        shutil.copytree(export / SOURCE, folder / SOURCE)


def _merged_state(export: Path, described: ExportDescription, merged: list[str]) -> dict[str, Tensor]:
    """Return the tensors of the merged parts, and everything else that the export holds, in float32."""
    model = build_flamingo(described.config, described.tokens, dtype=described.dtype, seed=described.seed)
    method = getattr(getattr(model.language_model.lm.config, "quantization_config", None), "quant_method", None)
    if "language_model" in merged and method is not None:
        raise ValueError(
            f"{export}: the language model is quantized ({method}), and rounding would change what the adapters add; "
            "leave --merge-adapters out, and load the adapters in adapter/ over it"
        )
    difference = explain_difference(json.loads((export / "frozen.json").read_text()), frozen_digests(model))
    if difference:
        raise ValueError(f"the frozen weights are not those that {export} was trained with ({difference})")
    cast_parameters(model, torch.float32)
    load_trained(model, read_trained(export))
    trained = set(trainable_parameters(model))
    merge_adapters(model)
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if LORA not in name and (name in trained or _is_in(name, merged))
    }


def _is_in(name: str, parts: list[str]) -> bool:
    return any(name.startswith(_PREFIXES[part]) for part in parts)
