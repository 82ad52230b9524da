"""Random changes of one image, drawn from its sample's own generator and never from a worker's or a rank's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from trainer.config.data_config import AugmentConfig

_DRAWS = 9


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for an image, or for all frames of a video, ready to be applied to pixels of any size.

    crop: share of the area, factor on the aspect (width / height), and the place of the window between its first and
    last possible one, vertically and horizontally; None crops nothing. brightness, contrast, saturation: factors, 1 for
    none. hue: turns of the color circle, 0 for none.
    """

    flip: bool = False
    crop: tuple[float, float, float, float] | None = None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def geometry(self, image: Tensor) -> Tensor:
        """Crop and flip, before the image is resized: uint8 [3, height, width] -> [3, at most those]."""
        if self.crop is not None:
            area, aspect, down, right = self.crop
            _, height, width = image.shape
            rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
            columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
            top, left = round(down * (height - rows)), round(right * (width - columns))
            image = image[:, top : top + rows, left : left + columns]
        return image.flip(-1) if self.flip else image

    def color(self, image: Tensor) -> Tensor:
        """Colors of the resized image, without the padding around it: uint8 [3, height, width], the same shape."""
        if self.brightness != 1:
            image = TF.adjust_brightness(image, self.brightness)
        if self.contrast != 1:
            image = TF.adjust_contrast(image, self.contrast)
        if self.saturation != 1:
            image = TF.adjust_saturation(image, self.saturation)
        return TF.adjust_hue(image, self.hue) if self.hue else image


def draw_augmentation(settings: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """One image's augmentation. Always draws equally many numbers, so that no setting shifts what another draws."""
    u = rng.random(_DRAWS).tolist()
    crop = None
    if settings.crop_scale != (1.0, 1.0) or settings.crop_ratio != (1.0, 1.0):
        area = settings.crop_scale[0] + u[1] * (settings.crop_scale[1] - settings.crop_scale[0])
        low, high = (math.log(bound) for bound in settings.crop_ratio)
        crop = (area, math.exp(low + u[2] * (high - low)), u[3], u[4])
    strengths = zip((settings.brightness, settings.contrast, settings.saturation), u[5:8], strict=True)
    brightness, contrast, saturation = (1 + strength * (2 * x - 1) for strength, x in strengths)
    hue = settings.hue * (2 * u[8] - 1)
    return Augmentation(u[0] < settings.horizontal_flip, crop, brightness, contrast, saturation, hue)
