"""Draw media and heat maps as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_MOST_FRAMES = 4  # of a video's preview
# Colors of the scale (red, green, blue in 0..1) and their opacities, from no attention to the most.
_SCALE = ((0.09, 0.11, 0.33), (0.52, 0.14, 0.45), (1.0, 0.50, 0.05))
_OPACITIES = (0.74, 0.62, 0.50)


def preview(pixels: Tensor, height: int) -> Image.Image:
    """Return a medium uint8 [F, 3, Y, X] as a picture of a height in pixels; up to 4 frames stand side by side."""
    places = torch.linspace(0, len(pixels) - 1, min(len(pixels), _MOST_FRAMES)).round().long()
    gap = 255 * torch.ones(3, pixels.shape[2], max(1, pixels.shape[3] // 32), dtype=torch.uint8)
    strip = [part for place in places for part in (gap, pixels[place])][1:]
    return _resize(_to_image(torch.cat(strip, 2)), height)


def heat_map(pixels: Tensor, map_YX: Tensor, height: int) -> Image.Image:
    """Draw a map over a medium: dark blue where the model hardly looked, bright orange where it looked most.

    Args:
        pixels: Medium, uint8 [F, 3, Y, X]; a video shows its middle frame.
        map_YX: Share of attention of each patch.
        height: Height of the picture in pixels.
    """
    image = _resize(_to_image(pixels[len(pixels) // 2]), height)
    size = (image.height, image.width)
    frame = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(*size, 3).permute(2, 0, 1) / 255
    most = map_YX.max().clamp(min=torch.finfo(torch.float32).tiny)
    heat = F.interpolate((map_YX / most)[None, None], size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    colors = torch.stack([_on_scale([color[channel] for color in _SCALE], heat[0]) for channel in range(3)])
    opacity = _on_scale(_OPACITIES, heat)
    drawn = frame * (1 - opacity) + colors * opacity
    return _to_image((255 * drawn).round().to(torch.uint8))


def data_uri(image: Image.Image) -> str:
    """Return a picture as the address that a page shows without another request."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _on_scale(stops: Sequence[float], heat: Tensor) -> Tensor:
    """Return the value of a scale with three equally distant stops at each heat in 0..1."""
    low, middle, high = stops
    return torch.where(heat < 0.5, low + 2 * heat * (middle - low), middle + (2 * heat - 1) * (high - middle))


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _resize(image: Image.Image, height: int) -> Image.Image:
    return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)
