"""Draw random changes of an image from the generator of its sample, and apply them.

The draws depend on the sample alone, never on a rank or a loader process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.data_config import AugmentConfig
from trainer.data.device_augmentation import LUMA, NUM_CHANGES

_NUM_DRAWS = 9
_MAP_BITS = 15  # those of float32 that a pixel's 8 bits and a carry leave
_RGB_TO_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


@dataclass(frozen=True)
class Augmentation:
    """Hold the changes drawn for an image, or for all frames of a video; they apply to pixels of any size.

    Attributes:
        flip: Whether the image is mirrored.
        crop: Share of the area, factor on the aspect (width / height), and the place of the window between its first
            and last possible one, vertically and horizontally. None crops nothing.
        brightness: Factor, 1 for no change.
        contrast: Factor, 1 for no change.
        saturation: Factor, 1 for no change.
        hue: Turns of the color circle, 0 for no change.
    """

    flip: bool = False
    crop: tuple[float, float, float, float] | None = None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def cut(self, image: Tensor) -> Tensor:
        """Crop uint8 [3, height, width] before it is resized; the result is never larger."""
        if self.crop is None:
            return image
        area, aspect, down, right = self.crop
        _, height, width = image.shape
        rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
        columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
        top, left = round(down * (height - rows)), round(right * (width - columns))
        window = image[:, top : top + rows, left : left + columns]
        # Pixels in one piece, in the order in which files are decoded: torch resizes these fastest.
        return window.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def mirrored(self, image: Tensor) -> Tensor:
        """Flip the resized image, uint8 [3, height, width], before it is padded; it is smaller by then."""
        return image.flip(-1) if self.flip else image

    def device_changes(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Return what ``augment_media`` has to do with an image that is cropped already, float64 [15].

        Args:
            top: First row of the image in its square; the rest is padding.
            left: First column.
            height: Rows of the image.
            width: Columns of the image.
        """
        matrix = self.color_map().flatten().tolist()
        share_of_mean = (1 - self.contrast) * self.brightness
        changes = [*matrix, share_of_mean, float(self.flip), top, left, height, width]
        assert len(changes) == NUM_CHANGES
        return torch.tensor(changes, dtype=torch.float64)

    def change_colors(self, image: Tensor) -> Tensor:
        """Change the colors of the resized image, uint8 [3, height, width], before it is padded.

        Brightness, contrast, saturation and hue are linear, so they are one map of colors, which is several times as
        fast as four. Values are clipped once, at its end. No sum is rounded, so no machine and no number of threads
        changes a pixel.
        """
        if self.brightness == self.contrast == self.saturation == 1 and self.hue == 0:
            return image
        flat = image.reshape(3, -1).numpy()
        mean = flat.sum(1, dtype=np.uint32 if flat.shape[1] < 1 << 24 else np.uint64) / flat.shape[1]
        # numpy takes half of torch's time on arrays of this size.
        changed = self.color_map() @ flat.astype(np.float32)
        luma = LUMA[0] * mean[0] + LUMA[1] * mean[1] + LUMA[2] * mean[2]  # in the order of the device's sum
        changed += np.float32((1 - self.contrast) * self.brightness * luma + 0.5)
        np.clip(changed, 0, 255, out=changed)
        return torch.from_numpy(changed.astype(np.uint8)).reshape(image.shape)

    def color_map(self) -> NDArray[np.float32]:
        """Return the linear part of the map of colors, [3, 3], rounded.

        It has so few bits that float32 holds its products with 8-bit pixels, and their sums, exactly.
        """
        matrix = self._color_matrix()
        largest = math.ceil(math.log2(max(1.0, float(np.abs(matrix).sum(1).max()))))
        unit = 2.0 ** (largest - _MAP_BITS)
        return (np.round(matrix / unit) * unit).astype(np.float32)

    def _color_matrix(self) -> NDArray[np.float64]:
        """Return the linear part of the map. The hue turns about the gray axis, in YIQ."""
        saturation = self.saturation * np.eye(3) + (1 - self.saturation) * np.tile(LUMA, (3, 1))
        angle = 2 * math.pi * self.hue
        turn = np.eye(3)
        turn[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        hue = np.linalg.inv(_RGB_TO_YIQ) @ turn @ _RGB_TO_YIQ
        return self.brightness * self.contrast * hue @ saturation


def draw_augmentation(settings: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """Draw the changes of one image.

    The number of draws is always the same, so that no setting shifts the draws of another.
    """
    u = rng.random(_NUM_DRAWS).tolist()
    crop = None
    if settings.crop_scale != (1.0, 1.0) or settings.crop_ratio != (1.0, 1.0):
        area = settings.crop_scale[0] + u[1] * (settings.crop_scale[1] - settings.crop_scale[0])
        low, high = (math.log(bound) for bound in settings.crop_ratio)
        crop = (area, math.exp(low + u[2] * (high - low)), u[3], u[4])
    strengths = zip((settings.brightness, settings.contrast, settings.saturation), u[5:8], strict=True)
    brightness, contrast, saturation = (1 + strength * (2 * x - 1) for strength, x in strengths)
    hue = settings.hue * (2 * u[8] - 1)
    return Augmentation(u[0] < settings.horizontal_flip, crop, brightness, contrast, saturation, hue)
