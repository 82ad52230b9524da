"""Bring pixels to the size that the vision tower takes; the same code runs in training and at inference.

Pixels are resized by torch's uint8 bicubic filter with antialiasing, which differs from Pillow's result by at most one
level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ImageFit = Literal["pad", "crop", "stretch"]

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
class ImageGeometry:
    """Bring an image to a square, or to a size within a budget of patches.

    An image that already has the size is not resampled.

    Attributes:
        size: Side in pixels of the square that an image becomes. Unused with a ``budget``.
        fit: How an image becomes the square: "pad" keeps the aspect, "crop" resizes the short side and crops the
            center, "stretch" ignores the aspect. Unused with a ``budget``.
        mean_color: Color of the padding, each channel in 0..255. The default is the mean of CLIP's towers.
        budget: Sizes of images that keep their aspect; None makes squares.
    """

    size: int
    fit: ImageFit = "pad"
    mean_color: tuple[int, int, int] = (122, 116, 104)
    budget: PatchBudget | None = None

    def resize_and_pad(self, image: Tensor, pixel_aspect: float = 1.0) -> Tensor:
        """Bring uint8 [3, height, width] to [3, size, size], or to a size within the budget.

        Args:
            image: Pixels.
            pixel_aspect: Width of a shown pixel divided by its height; 1 for all images and most videos.
        """
        return self.pad(self.resize(image, pixel_aspect))

    def resize(self, image: Tensor, pixel_aspect: float = 1.0) -> Tensor:
        """Resize to the square, to the part of it that is not padding, or to a size within the budget."""
        height, width = shown_size(image.shape[1], image.shape[2], pixel_aspect)
        if self.budget is not None:
            return _resample(image, *self.budget.size(height, width))
        if self.fit == "stretch" or height == width:
            return _resample(image, self.size, self.size)
        if self.fit == "crop":
            longest = _LARGEST_CROP_ASPECT * min(height, width)
            rows, columns = min(height, longest), min(width, longest)
            image = _center_crop(
                image, max(1, image.shape[1] * rows // height), max(1, image.shape[2] * columns // width)
            )
            # Sizes and offsets are rounded like those of torchvision's Resize and CenterCrop, so that a tower sees the
            # same pixels as in its pretraining.
            resized = _resample(image, *(int(self.size * side / min(rows, columns)) for side in (rows, columns)))
            return _center_crop(resized, self.size, self.size)
        scale = self.size / max(height, width)
        return _resample(image, max(1, round(height * scale)), max(1, round(width * scale)))

    def pad(self, image: Tensor) -> Tensor:
        """Place a resized image in the middle of the square; with a budget it needs no padding."""
        if self.budget is not None or image.shape[1:] == (self.size, self.size):
            return image.contiguous()
        canvas = torch.tensor(self.mean_color, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        top, left = (self.size - image.shape[1]) // 2, (self.size - image.shape[2]) // 2
        canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        return canvas


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


def _resample(image: Tensor, height: int, width: int) -> Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image.contiguous()
    resized = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].contiguous()
