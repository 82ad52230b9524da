"""Decode the bytes of an image to uint8 pixels of the size that the vision tower takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.image_geometry import ImageGeometry
from trainer.config.data_config import AugmentConfig, DataConfig
from trainer.data.errors import SampleError
from trainer.data.samples.augmentation import Augmentation, draw_augmentation
from trainer.data.samples.image_file import decode_image, image_size
from trainer.data.samples.sample_members import image_member


@dataclass(frozen=True)
class ImageDecoder(ImageGeometry):
    """Decode an image to uint8 [3, height, width] (RGB) of a given geometry; the device normalizes it later.

    Attributes:
        max_pixels: Most pixels by the header (``data.max_pixels``); larger images are not decoded.
        augment: Random changes of each image; None makes none.
    """

    max_pixels: int = DataConfig.max_pixels
    augment: AugmentConfig | None = None

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

    def without_colors(self, members: Mapping[str, bytes], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Decode the only image of a sample, but leave flips and colors to the device (``data.augmentation``).

        Returns:
            The medium, uint8 [1, 3, height, width], and what ``augment_media`` has to do with it.

        Raises:
            SampleError: As for ``medium``.
        """
        array = decode_image(image_member(members), self.check_pixels)
        augmentation = self.draw_augmentation(rng) or Augmentation()
        image = self.resize(augmentation.cut(torch.from_numpy(array).permute(2, 0, 1)))
        padded = self.pad(image)
        height, width = image.shape[1:]
        top, left = ((whole - part) // 2 for whole, part in zip(padded.shape[1:], (height, width), strict=True))
        return padded[None], augmentation.device_changes(top, left, height, width)

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
        if augmentation is None:
            return self.resize_and_pad(image, pixel_aspect)
        image = self.resize(augmentation.cut(image), pixel_aspect)
        return self.pad(augmentation.change_colors(augmentation.mirrored(image)))
