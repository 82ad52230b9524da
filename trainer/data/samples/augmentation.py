"""Draw random changes of an image from the generator of its sample, and apply them.

The draws depend on the sample alone, never on a rank or a loader process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from trainer.config.data_config import AugmentConfig

_NUM_DRAWS = 9


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

    def change_geometry(self, image: Tensor) -> Tensor:
        """Crop and flip uint8 [3, height, width] before it is resized; the result is never larger."""
        if self.crop is not None:
            area, aspect, down, right = self.crop
            _, height, width = image.shape
            rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
            columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
            top, left = round(down * (height - rows)), round(right * (width - columns))
            image = image[:, top : top + rows, left : left + columns]
        return image.flip(-1) if self.flip else image

    def change_colors(self, image: Tensor) -> Tensor:
        """Change the colors of the resized image, uint8 [3, height, width], before it is padded."""
        if self.brightness != 1:
            image = TF.adjust_brightness(image, self.brightness)
        if self.contrast != 1:
            image = TF.adjust_contrast(image, self.contrast)
        if self.saturation != 1:
            image = TF.adjust_saturation(image, self.saturation)
        return TF.adjust_hue(image, self.hue) if self.hue else image


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
