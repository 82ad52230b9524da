"""Load the model of an export with the settings that turn text and pixels into its input."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from model.flamingo import Flamingo
from model.pretrained import from_pretrained, load_exported_tokenizer
from model.processor import ProcessorConfig, TextLayout, load_processor_config, read_processor_config
from trainer.data.samples.prompt_media import override, with_video_settings


@dataclass(frozen=True)
class ExportedModel:
    """Hold a model in evaluation mode with the settings of its input.

    Attributes:
        model: Model, on its device.
        layout: Encodes prompts as training did.
        processor: Describes pixels as training had them, apart from what flags replaced.
    """

    model: Flamingo
    layout: TextLayout
    processor: ProcessorConfig


def load_layout(folder: Path) -> TextLayout:
    """Read how an export encodes text, without its weights.

    Raises:
        OSError: A file cannot be read.
        ValueError: The folder is no export, or damaged.
    """
    processor = read_processor_config(folder)
    return TextLayout(load_exported_tokenizer(folder), processor is not None and processor.space_after_image)


def load_exported_model(
    folder: Path, layout: TextLayout, flags: argparse.Namespace, *, with_videos: bool
) -> ExportedModel:
    """Load the weights of an export.

    Args:
        folder: Export folder.
        layout: Layout of the export.
        flags: Values of ``flags.add_pixel_flags`` and ``flags.add_device_flags``.
        with_videos: Whether prompts may have videos; a model that was trained without gets settings for them.

    Raises:
        OSError: A file cannot be read.
        ValueError: The folder is no export, damaged, or its frozen weights have changed.
    """
    model = from_pretrained(folder, dtype=flags.dtype, device=flags.device)
    processor = override(
        load_processor_config(folder, model.vision_encoder),
        folder,
        image_fit=("--image-fit", flags.image_fit),
        image_tokens=("--image-tokens", flags.image_tokens),
    )
    if with_videos:
        frames = (flags.num_frames, flags.frames_per_second)
        processor = with_video_settings(processor, *frames, default_frames=model.config.resampler.num_frames or 1)
    return ExportedModel(model, layout, processor)
