"""Convert images of any mode to RGB; the same code runs in training and at inference."""

from __future__ import annotations

import numpy as np
from PIL import Image


class UnsupportedPixelsError(ValueError):
    """Report pixels whose range is not known."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB: alpha is composited over white, 16-bit gray is scaled.

    Raises:
        UnsupportedPixelsError: The range of the pixels is not known.
    """
    mode = image.mode
    if mode.startswith("I"):
        return _scale_gray_16(image)
    if mode == "F":
        raise UnsupportedPixelsError("floating-point pixels have no known range")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_gray_16(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray so that 65535 is white; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnsupportedPixelsError(f"gray values from {values.min()} to {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
