"""Read the images of a prompt, and turn them into the model's media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from model.media_inputs import media_inputs
from model.tower_patches import Grid
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder


def read_images(paths: Sequence[Path], decoder: ImageDecoder) -> list[Tensor]:
    """Read image files to media of one frame, uint8 [1, 3, height, width] each.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not an image; the error names it.
    """
    images = []
    for path in paths:
        try:
            images.append(decoder(path.read_bytes())[None])
        except SampleError as error:
            raise ValueError(f"{path}: {error}") from error
    return images


def model_media(images: Sequence[Tensor], decoder: ImageDecoder) -> tuple[Tensor | None, tuple[Grid, ...] | None]:
    """Return ``media`` and ``media_grids`` for the model; both are None if there are no images."""
    if not images:
        return None, None
    return media_inputs(images, None if decoder.budget is None else decoder.budget.patch_size)
