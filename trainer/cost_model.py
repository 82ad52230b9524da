"""What a run will cost, from its configuration alone: sizes of the model, and the speeds of known devices."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import FlamingoConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload
from model.presets import PRESETS, preset
from model.tokens import SpecialTokenIds
from trainer.config.schema import InterleavedSource, Source, TextSource, VideoTextSource


@dataclass(frozen=True)
class Device:
    """An accelerator, by its data sheet.

    tflops: dense bfloat16. memory: bytes. host_link: bytes a second to the host, one way. node_link: between devices of
    a node, each way. network: of one device to other nodes (its share of the node's adapters).
    """

    tflops: float
    memory: float
    host_link: float
    node_link: float
    network: float


# memory: what a process can have of the nominal one. network: a 400 Gbit/s adapter a device (200 for A100).
DEVICES = {
    "a100-40": Device(312, 39e9, 25e9, 300e9, 25e9),
    "a100-80": Device(312, 79e9, 25e9, 300e9, 25e9),
    "h100": Device(989, 79e9, 50e9, 450e9, 50e9),
    "h200": Device(989, 140e9, 50e9, 450e9, 50e9),
    "b200": Device(2250, 180e9, 50e9, 900e9, 50e9),
    "rtx-4090": Device(165, 24e9, 25e9, 25e9, 12e9),
}


def without_weights(config: FlamingoConfig) -> FlamingoConfig:
    """The same model with random weights, that needs no hub: for measuring and planning.

    A language model with a name becomes the architecture in its local folder, or else that of ``preset``.

    Raises:
        ValueError: neither is there.
    """
    language_model = config.language_model
    if language_model.name is not None:
        if (Path(language_model.name) / "config.json").is_file():
            from transformers import AutoConfig

            architecture = AutoConfig.from_pretrained(language_model.name, local_files_only=True).to_dict()
        elif config.preset in PRESETS:
            architecture = copy.deepcopy(preset(config.preset).language_model.architecture)
        else:
            raise ValueError(
                f"model.language_model.name {language_model.name!r} is no local folder with a config.json, and the hub "
                "is not asked: set model.language_model.architecture (and name to null), or model.preset"
            )
        language_model = replace(language_model, name=None, revision=None, architecture=architecture)
    name = config.vision.name
    pretrained = None if not name.startswith(("local-dir:", "hf-hub:")) else config.vision.pretrained
    return replace(config, language_model=language_model, vision=replace(config.vision, pretrained=pretrained))


def made_up_tokens(config: FlamingoConfig) -> SpecialTokenIds:
    """New tokens behind the language model's table, for a config from ``without_weights``."""
    from transformers import AutoConfig

    architecture = dict(config.language_model.architecture or {})
    text = AutoConfig.for_model(architecture.pop("model_type"), **architecture).get_text_config()
    return SpecialTokenIds(text.vocab_size, text.vocab_size + 1, bos_id=1, eos_id=2, pad_id=0)


def build_without_weights(config: FlamingoConfig) -> Flamingo:
    """The model on the meta device: shapes, and no memory. Raises ValueError like ``without_weights``."""
    config = without_weights(config)
    with torch.device("meta"):
        return build_flamingo(config, made_up_tokens(config))


def expected_media(source: Source) -> tuple[int, int]:
    """(media of a row, frames of each): the most that the source's settings allow."""
    match source:
        case InterleavedSource():
            return source.max_images, 1
        case VideoTextSource():
            return 1, source.frames
        case TextSource():
            return 0, 1
    return 1, 1


def executed_flops(sizes: UsefulFlops, workload: Workload, recompute: bool) -> float:
    """FLOPs that the devices execute for one sequence: the useful ones, and what checkpointing computes again."""
    parts = sizes.parts(workload)
    total = sum(parts.values())
    if recompute:  # a forward of what stands in the blocks: half of 4 N, a third of 6 N
        total += parts["language_model"] / 2
        total += (parts["cross_attention_text"] + parts["cross_attention_media"]) / 3
    return total
