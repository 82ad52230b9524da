"""Bytes to what the model takes: images as uint8, text as str, JSON as plain values.

JPEG goes through simplejpeg, everything else through Pillow, and both are resized by torch's uint8 bicubic filter with
antialiasing (measured: 3-4 x open_clip's preprocessing, at most one level away from Pillow's result; data.md).
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainer.config.data_config import AugmentConfig
from trainer.data.errors import SampleError
from trainer.data.samples.augment import Augmentation, draw_augmentation

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
# Formats whose decoders run inside this process. In particular not EPS, which Pillow gives to Ghostscript.
_PILLOW_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_ORIENTATION_TAG = 0x0112
_JPEG_START = b"\xff\xd8\xff"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_CROP_MARGIN = 4  # sides; a longer image is cut to this aspect before its short side is resized


@dataclass(frozen=True)
class PatchBudget:
    """At most ``patches`` squares of ``patch_size`` pixels for an image, in its own aspect."""

    patches: int
    patch_size: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels, as large as the budget allows and of whole patches.

        Both sides are rounded down, so the aspect changes by less than 1 / (patches of the shorter side); an image that
        is longer than the budget in single patches becomes one row or column of all of them.
        """
        rows, columns = math.isqrt(self.patches * height // width), math.isqrt(self.patches * width // height)
        rows, columns = (min(max(1, side), self.patches) for side in (rows, columns))
        return rows * self.patch_size, columns * self.patch_size


@dataclass(frozen=True)
class ImageDecoder:
    """Image bytes -> uint8 [3, height, width] (RGB), normalized later on the device.

    size: side in pixels of the square that an image becomes, unless there is a ``budget``. fit: ``pad`` keeps the
    aspect and pads with ``mean_color`` (0 to 255), ``crop`` resizes the short side and crops the center, ``stretch``
    ignores the aspect. max_pixels: images whose header says more are refused before they are decoded.

    EXIF orientation is applied, alpha is composited over white, 16-bit gray is scaled, the first frame of an animation
    is used. An image that has the size already is not resampled. augment: what may change in an image at random.
    budget: keep the aspect in whole patches instead of making a square; ``fit`` then means nothing.
    """

    size: int
    fit: Literal["pad", "crop", "stretch"] = "pad"
    mean_color: tuple[int, int, int] = (122, 116, 104)
    max_pixels: int = 178_956_970
    augment: AugmentConfig | None = None
    budget: PatchBudget | None = None

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> Tensor:
        """The image, augmented where there are both ``augment`` and the sample's generator.

        Raises SampleError: empty_image, truncated_image, corrupt_image, too_many_pixels, unsupported_image.
        """
        if not data:
            raise SampleError("empty_image", "the image has no bytes")
        array = self._decode_jpeg(data) if data.startswith(_JPEG_START) else self._decode_other(data)
        return self.fitted(torch.from_numpy(array).permute(2, 0, 1), self.draw(rng))

    def draw(self, rng: np.random.Generator | None) -> Augmentation | None:
        """How the next image, or video, of a sample is to be augmented."""
        return None if rng is None or self.augment is None else draw_augmentation(self.augment, rng)

    def header_size(self, data: bytes) -> tuple[int, int]:
        """Width and height as the header says, before any rotation. Raises SampleError like a call."""
        if not data:
            raise SampleError("empty_image", "the image has no bytes")
        try:
            if data.startswith(_JPEG_START):
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                return width, height
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                    return image.size
        except Image.DecompressionBombError as error:
            raise SampleError("too_many_pixels", str(error)) from error
        except MemoryError:
            raise
        except Exception as error:  # as in decoding
            raise _image_error(error) from error

    def _decode_jpeg(self, data: bytes) -> NDArray[np.uint8]:
        """uint8 [height, width, 3]; gray and CMYK become RGB."""
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            self.check_pixels(width, height)
            array = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise _image_error(error) from error
        return _apply_orientation(array, _orientation(data))

    def _decode_other(self, data: bytes) -> NDArray[np.uint8]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of half its own limit; max_pixels decides here
                with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                    self.check_pixels(*image.size)
                    return np.array(_to_rgb(ImageOps.exif_transpose(image)))
        except Image.DecompressionBombError as error:
            raise SampleError("too_many_pixels", str(error)) from error
        except UnidentifiedImageError as error:
            raise SampleError("corrupt_image", "no known image format") from error
        except (SampleError, MemoryError):
            raise
        except Exception as error:  # Pillow's plugins raise whatever they stumble over
            raise _image_error(error) from error

    def check_pixels(self, width: int, height: int) -> None:
        """Raises SampleError (too_many_pixels)."""
        if width * height > self.max_pixels:
            raise SampleError("too_many_pixels", f"{width} x {height} exceeds data.max_pixels = {self.max_pixels}")

    def fitted(self, image: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        """uint8 [3, height, width] -> [3, size, size], or what the budget allows."""
        if augmentation is not None:
            image = augmentation.geometry(image)
        inner = self._resized(image)
        if augmentation is not None:
            inner = augmentation.color(inner)
        if self.budget is not None or inner.shape[1:] == (self.size, self.size):
            return inner.contiguous()
        canvas = torch.tensor(self.mean_color, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        top, left = (self.size - inner.shape[1]) // 2, (self.size - inner.shape[2]) // 2
        canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        return canvas

    def _resized(self, image: Tensor) -> Tensor:
        """The square, or what ``pad`` puts into it, or what the budget allows."""
        _, height, width = image.shape
        if self.budget is not None:
            return _resize(image, *self.budget.size(height, width))
        if self.fit == "stretch" or height == width:
            return _resize(image, self.size, self.size)
        if self.fit == "crop":
            longest = _CROP_MARGIN * min(height, width)
            image = _center_crop(image, min(height, longest), min(width, longest))
            # Sizes and offsets are rounded as torchvision's Resize and CenterCrop do, so that a tower sees the pixels
            # that it was pretrained on.
            shortest = min(image.shape[1:])
            resized = _resize(image, *(int(self.size * side / shortest) for side in image.shape[1:]))
            return _center_crop(resized, self.size, self.size)
        scale = self.size / max(height, width)
        return _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))


def image_member(members: Mapping[str, bytes]) -> bytes:
    """The one image of a sample. Raises SampleError: missing_image, several_images."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if not found:
        raise SampleError("missing_image", f"members: {', '.join(sorted(members))}")
    if len(found) > 1:
        raise SampleError("several_images", f"which of {', '.join(found)}?")
    return members[found[0]]


def text_member(members: Mapping[str, bytes], extension: str = "txt") -> str:
    """The text of a sample without white space around it.

    Raises SampleError: missing_text, invalid_utf8, empty_text.
    """
    if extension not in members:
        raise SampleError("missing_text", f"no .{extension}; members: {', '.join(sorted(members))}")
    text = decode_text(members[extension]).strip()
    if not text:
        raise SampleError("empty_text", f"the .{extension} is empty")
    return text


def decode_text(data: bytes) -> str:
    """Strict utf-8, with or without a byte order mark. Raises SampleError (invalid_utf8)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("invalid_utf8", f"byte {error.start}: {error.reason}") from error


def decode_json(data: bytes) -> Any:
    """JSON by the standard: NaN, Infinity, numbers beyond double precision, repeated names and halves of surrogate
    pairs (which no encoding of text has, and no tokenizer takes) are refused.

    Raises SampleError: invalid_utf8, invalid_json.
    """
    text = decode_text(data)
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_finite_int,
            object_pairs_hook=_unique_names,
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value


def _finite_int(text: str) -> int:
    value = int(text)
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"a number of {len(text)} digits is out of range") from error
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a name comes twice in {[name for name, _ in pairs]}")
    return result


def _known_formats() -> tuple[str, ...]:
    Image.init()  # returns at once after the first call
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _image_error(error: Exception) -> SampleError:
    text = str(error) or type(error).__name__
    cut = any(word in text.lower() for word in ("truncated", "premature", "unexpected end"))
    return SampleError("truncated_image" if cut else "corrupt_image", text)


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        return _gray_16(image)
    if mode == "F":
        raise SampleError("unsupported_image", "floating-point pixels have no known range")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _gray_16(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255; 65535 is white here."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise SampleError("unsupported_image", f"gray values from {values.min()} to {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _orientation(jpeg: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 (upright) where there is none or it cannot be read."""
    if b"Exif\0\0" not in jpeg[: 1 << 17]:
        return 1
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  damaged metadata beside good pixels
        return 1
    return value if isinstance(value, int) else 1


def _apply_orientation(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] turned upright (EXIF 2.3, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _center_crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image.contiguous()
    resized = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].contiguous()
