"""Images of prompts, as the sources of the training make them (``trainer.tasks.row_builders``, without augmentation)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from model.tower_patches import Grid
from model.vision_encoder import VisionEncoder
from trainer.data.batch import media_inputs
from trainer.data.errors import SampleError
from trainer.data.samples.decode import ImageDecoder, PatchBudget


def decoder_of(
    encoder: VisionEncoder, fit: Literal["pad", "crop", "stretch"] = "pad", image_tokens: int | None = None
) -> ImageDecoder:
    """Image bytes to the tower's input, as in training: its square, or with ``image_tokens`` whole patches.

    Raises ValueError for ``image_tokens`` and a tower that takes squares only.
    """
    red, green, blue = (round(255 * value) for value in encoder.mean)
    budget = None
    if image_tokens is not None:
        if encoder.patch_size is None:
            raise ValueError(f"image_tokens: the tower {encoder.config.name!r} takes squares only: leave this out")
        budget = PatchBudget(image_tokens, encoder.patch_size)
    return ImageDecoder(encoder.image_size, fit, (red, green, blue), budget=budget)


def read_images(paths: Sequence[Path], decoder: ImageDecoder) -> list[Tensor]:
    """uint8 [1, 3, height, width] each.

    Raises: OSError; ValueError naming a file that is no image.
    """
    images = []
    for path in paths:
        try:
            images.append(decoder(path.read_bytes())[None])
        except SampleError as error:
            raise ValueError(f"{path}: {error}") from error
    return images


def model_media(images: Sequence[Tensor], decoder: ImageDecoder) -> tuple[Tensor | None, tuple[Grid, ...] | None]:
    """``media`` and ``media_grids`` of what the decoder made; neither where there are no images."""
    if not images:
        return None, None
    return media_inputs(images, None if decoder.budget is None else decoder.budget.patch_size)
