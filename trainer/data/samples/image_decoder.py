"""Decode the bytes of an image to uint8 pixels of the size that the vision tower takes.

Pixels are resized by torch's uint8 bicubic filter with antialiasing, which differs from Pillow's result by at most one
level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.data_config import AugmentConfig, DataConfig
from trainer.data.errors import SampleError
from trainer.data.samples.augmentation import Augmentation, draw_augmentation
from trainer.data.samples.image_file import decode_image, image_size
from trainer.data.samples.sample_members import image_member

_LARGEST_CROP_ASPECT = 4  # longer images are cut to this aspect before they are resized, which bounds the memory


@dataclass(frozen=True)
class PatchBudget:
    """Choose the size of an image that keeps its aspect.

    Attributes:
        patches: Most patches of one image.
        patch_size: Side of a square patch in pixels.
    """

    patches: int
    patch_size: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the largest height and width in pixels that are whole patches within the budget.

        Both sides are rounded down, so the aspect changes by less than 1 / (patches of the shorter side). An image that
        would be thinner than one patch becomes a single row or column of patches.
        """
        rows, columns = math.isqrt(self.patches * height // width), math.isqrt(self.patches * width // height)
        rows, columns = (min(max(1, side), self.patches) for side in (rows, columns))
        return rows * self.patch_size, columns * self.patch_size


@dataclass(frozen=True)
class ImageDecoder:
    """Decode an image to uint8 [3, height, width] (RGB); the device normalizes it later.

    An image that already has the size is not resampled.

    Attributes:
        size: Side in pixels of the square that an image becomes. Unused with a ``budget``.
        fit: How an image becomes the square (``data.image_fit``). Unused with a ``budget``.
        mean_color: Color of the padding, each channel in 0..255. The default is the mean of CLIP's towers.
        max_pixels: Most pixels by the header (``data.max_pixels``); larger images are not decoded.
        augment: Random changes of each image; None makes none.
        budget: Sizes of images that keep their aspect; None makes squares.
    """

    size: int
    fit: Literal["pad", "crop", "stretch"] = DataConfig.image_fit
    mean_color: tuple[int, int, int] = (122, 116, 104)
    max_pixels: int = DataConfig.max_pixels
    augment: AugmentConfig | None = None
    budget: PatchBudget | None = None

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> Tensor:
        """Decode one image, and augment it if there is an ``rng``.

        Args:
            data: Encoded image.
            rng: Generator of the sample; None leaves the image as it is.

        Raises:
            SampleError: empty_image, truncated_image, corrupt_image, too_many_pixels, unsupported_image.
        """
        array = decode_image(data, self.check_pixels)
        return self.fit_pixels(torch.from_numpy(array).permute(2, 0, 1), self.draw_augmentation(rng))

    def medium(self, members: Mapping[str, bytes], rng: np.random.Generator) -> Tensor:
        """Decode the only image of a sample to a medium of one frame, uint8 [1, 3, height, width].

        Raises:
            SampleError: As for one image; missing_image, several_images.
        """
        return self(image_member(members), rng)[None]

    def frame_size(self, members: Mapping[str, bytes]) -> tuple[int, int]:
        """Return width and height of the only image of a sample, from its header.

        Raises:
            SampleError: As ``image_size``; missing_image, several_images.
        """
        return image_size(image_member(members))

    def draw_augmentation(self, rng: np.random.Generator | None) -> Augmentation | None:
        """Draw the changes of the next image, or of all frames of a video."""
        return None if rng is None or self.augment is None else draw_augmentation(self.augment, rng)

    def check_pixels(self, width: int, height: int) -> None:
        """Refuse images and frames of more than ``max_pixels``.

        Raises:
            SampleError: too_many_pixels.
        """
        if width * height > self.max_pixels:
            raise SampleError("too_many_pixels", f"{width} x {height} exceeds data.max_pixels = {self.max_pixels}")

    def fit_pixels(self, image: Tensor, augmentation: Augmentation | None = None, pixel_aspect: float = 1.0) -> Tensor:
        """Augment and resize uint8 [3, height, width] to [3, size, size], or to a size within the budget.

        Args:
            image: Pixels.
            augmentation: Changes of the image.
            pixel_aspect: Width of a shown pixel divided by its height; 1 for all images and most videos.
        """
        if augmentation is not None:
            image = augmentation.change_geometry(image)
        inner = self._resize_to_fit(image, pixel_aspect)
        if augmentation is not None:
            inner = augmentation.change_colors(inner)
        if self.budget is not None or inner.shape[1:] == (self.size, self.size):
            return inner.contiguous()
        canvas = torch.tensor(self.mean_color, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        top, left = (self.size - inner.shape[1]) // 2, (self.size - inner.shape[2]) // 2
        canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        return canvas

    def _resize_to_fit(self, image: Tensor, pixel_aspect: float) -> Tensor:
        """Resize to the square, to the part of it that is not padding, or to a size within the budget."""
        height, width = shown_size(image.shape[1], image.shape[2], pixel_aspect)
        if self.budget is not None:
            return _resize(image, *self.budget.size(height, width))
        if self.fit == "stretch" or height == width:
            return _resize(image, self.size, self.size)
        if self.fit == "crop":
            longest = _LARGEST_CROP_ASPECT * min(height, width)
            rows, columns = min(height, longest), min(width, longest)
            image = _center_crop(
                image, max(1, image.shape[1] * rows // height), max(1, image.shape[2] * columns // width)
            )
            # Sizes and offsets are rounded like those of torchvision's Resize and CenterCrop, so that a tower sees the
            # same pixels as in its pretraining.
            resized = _resize(image, *(int(self.size * side / min(rows, columns)) for side in (rows, columns)))
            return _center_crop(resized, self.size, self.size)
        scale = self.size / max(height, width)
        return _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))


def shown_size(height: int, width: int, pixel_aspect: float) -> tuple[int, int]:
    """Return height and width in square pixels; the side along which pixels are longer grows."""
    if pixel_aspect >= 1:
        return height, round(width * pixel_aspect)
    return round(height / pixel_aspect), width


def padding_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """Convert a tower's mean, in 0..1 for each channel, to ``mean_color``."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def _center_crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image.contiguous()
    resized = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].contiguous()
