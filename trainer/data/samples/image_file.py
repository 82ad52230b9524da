"""Decode an image file to RGB pixels of its own size.

JPEG is decoded by simplejpeg, every other format by Pillow. simplejpeg refuses every file that libjpeg warns about.
Pillow is asked for those whose pixels are whole nevertheless, and for unusual samplings.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from model.pixels import UnsupportedPixelsError, to_rgb
from trainer.data.errors import SampleError

# Formats whose decoders run inside this process. EPS is left out: Pillow hands it to Ghostscript.
_PILLOW_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_ORIENTATION_TAG = 0x0112
_TIFF_TILE_TAGS = (322, 323)  # width and height
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JFIF_VERSION = 11  # byte of a JPEG that begins with a JFIF segment
_MOST_SCANS = 100  # of a large JPEG; encoders write about 10, and each one takes the time of a decode
_LARGE = 1 << 20  # pixels
_PNG_START = b"\x89PNG\r\n\x1a\n"
_BAND_PIXELS = 1 << 20  # converted at once: Pillow's conversions hold several copies of an image
# What libjpeg says where pixels are missing or wrong (jerror.h). All its other warnings leave them whole.
_LOST_PIXELS = ("premature", "bad huffman code", "bad arithmetic code", "inconsistent progression", "too many bad")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_FEW_BYTES = 64

CheckPixels = Callable[[int, int], None]
_Result = TypeVar("_Result")


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height from the header of an encoded image, before any rotation.

    Raises:
        SampleError: empty_image, truncated_image, corrupt_image, too_many_pixels.
    """
    _require_bytes(data)
    if data.startswith(_JPEG_START):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return width, height
        except Exception:  # noqa: BLE001  of any type; Pillow reads headers that simplejpeg does not
            return _ask_pillow(data, lambda image: image.size)
    return _ask_pillow(data, lambda image: image.size)


def decode_image(data: bytes, check_pixels: CheckPixels) -> NDArray[np.uint8]:
    """Decode an image to uint8 [height, width, 3] (RGB).

    EXIF orientation is applied, alpha is composited over white, 16-bit gray is scaled, CMYK and gray become RGB, and of
    an animation the first frame is taken.

    Args:
        data: Encoded image.
        check_pixels: Raises a SampleError if an image of this width and height is too large; called with what the
            header says, before anything is decoded.

    Raises:
        SampleError: empty_image, truncated_image, corrupt_image, unsupported_image, and that of ``check_pixels``.
    """
    _require_bytes(data)
    if data.startswith(_JPEG_START):
        return _decode_jpeg(data, check_pixels)
    return _ask_pillow(data, lambda image: _decoded(image, check_pixels))


def _require_bytes(data: bytes) -> None:
    if not data:
        raise SampleError("empty_image", "the image has no bytes")


def _decode_jpeg(data: bytes, check_pixels: CheckPixels) -> NDArray[np.uint8]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        check_pixels(width, height)
        _check_scans(data, width, height)
        return _apply_orientation(simplejpeg.decode_jpeg(data, "RGB"), _jpeg_orientation(data))
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # KeyError for unusual samplings
        if "unknown JFIF revision" in str(error) and data[_JFIF_VERSION] != 1:
            # libjpeg reports its first warning alone. Without this one, it finds others.
            return _decode_jpeg(data[:_JFIF_VERSION] + b"\x01" + data[_JFIF_VERSION + 1 :], check_pixels)
        if "Premature end of JPEG file" in str(error) and not data.endswith(_JPEG_END):
            # Only the end mark may be missing. With one, libjpeg still finds that pixels are.
            return _decode_jpeg(data + _JPEG_END, check_pixels)
        if isinstance(error, ValueError) and not _keeps_pixels(str(error), len(data)):
            raise _image_error(error) from error

    def decode(image: Image.Image) -> NDArray[np.uint8]:
        _check_scans(data, *image.size)
        return _decoded(image, check_pixels)

    return _ask_pillow(data, decode)


def _keeps_pixels(message: str, size: int) -> bool:
    """Return whether all pixels can be whole in a JPEG of ``size`` bytes that libjpeg says this about.

    Where a file was padded, few bytes are extraneous, or they stand before the end (0xd9) or a metadata segment. Where
    its data were damaged, the decoder loses its place and passes over most of them.
    """
    extraneous = _EXTRANEOUS.search(message)
    if extraneous is None:
        return not any(words in message.lower() for words in _LOST_PIXELS)
    count, marker = int(extraneous[1]), int(extraneous[2], 16)
    return count <= (size // 2 if marker == 0xD9 or marker >= 0xE0 else _FEW_BYTES)


def _check_scans(data: bytes, width: int, height: int) -> None:
    if width * height > _LARGE and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise SampleError("corrupt_image", f"{scans} scans of {width} x {height} pixels")


def _ask_pillow(data: bytes, use: Callable[[Image.Image], _Result]) -> _Result:
    """Open an image with Pillow and return ``use(image)``.

    A PNG that fails is tried again without its texts, profiles and other segments that no pixel depends on: Pillow
    refuses large and damaged ones.

    Raises:
        SampleError: truncated_image, corrupt_image, too_many_pixels, and those of ``use``.
    """
    try:
        return _open_and_use(data, use)
    except SampleError as error:
        pixels_alone = _without_metadata(data)
        if pixels_alone is None or error.reason == "too_many_pixels":
            raise
    return _open_and_use(pixels_alone, use)


def _open_and_use(data: bytes, use: Callable[[Image.Image], _Result]) -> _Result:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half of its own limit; max_pixels decides here
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                return use(image)
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise SampleError("corrupt_image", "no known image format") from error
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise _image_error(error) from error


def _known_formats() -> tuple[str, ...]:
    Image.init()  # returns at once after the first call
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _image_error(error: Exception) -> SampleError:
    text = str(error) or type(error).__name__
    truncated = any(word in text.lower() for word in ("truncated", "premature", "unexpected end"))
    return SampleError("truncated_image" if truncated else "corrupt_image", text)


def _without_metadata(data: bytes) -> bytes | None:
    """Return a PNG without the chunks that no pixel depends on; None if it has none, or is no PNG."""
    if not data.startswith(_PNG_START):
        return None
    kept, start = [_PNG_START], len(_PNG_START)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind, chunk = data[start + 4 : start + 8], data[start:end]
        is_critical = not kind[0] & 0x20
        # The orientation, unless it is damaged itself.
        is_exif = kind == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if is_critical or is_exif or kind == b"tRNS":
            kept.append(chunk)
        if kind == b"IEND":
            break
        start = end
    stripped = b"".join(kept)
    return stripped if len(stripped) < len(data) else None


def _decoded(image: Image.Image, check_pixels: CheckPixels) -> NDArray[np.uint8]:
    check_pixels(*image.size)
    if image.format == "TIFF":
        width, height = (image.tag_v2.get(tag) for tag in _TIFF_TILE_TAGS)  # type: ignore[attr-defined]
        if isinstance(width, int) and isinstance(height, int):
            check_pixels(width, height)  # a single tile may be larger than the image
    image.load()
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if height <= rows:
        array = np.array(_to_rgb(image))
    else:
        array = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            array[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom))))
    return _apply_orientation(array, _orientation(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return to_rgb(image)
    except UnsupportedPixelsError as error:
        raise SampleError("unsupported_image", str(error)) from error


def _jpeg_orientation(jpeg: bytes) -> int:
    if b"Exif\0\0" not in jpeg[: 1 << 17]:
        return 1
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # noqa: BLE001  the metadata are damaged, the pixels may still be good
        return 1


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  of any type
        return 1
    return value if isinstance(value, int) else 1


def _apply_orientation(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn uint8 [height, width, 3] upright (EXIF 2.3, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
