"""Decode real images, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from model.image_geometry import PatchBudget
from tests.data.helpers import image_bytes, noise, saved
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder

MEAN = (1, 2, 3)


def decoder(size: int = 8, fit: Any = "pad", **options: Any) -> ImageDecoder:
    return ImageDecoder(size, fit, mean_color=MEAN, **options)


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(SampleError) as caught:
        decoder(**options)(data)
    return caught.value.reason


def difference(ours: torch.Tensor, theirs: Image.Image) -> int:
    return int((ours.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().max())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_resize_equals_pillows(kind: str) -> None:
    data = saved(noise(90, 120), kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert difference(decoder(32, "stretch")(data), expected) <= 1


@pytest.mark.parametrize("size", [(90, 120), (123, 77), (33, 32), (300, 41)])
def test_crop_equals_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = noise(*size)
    expected = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    assert difference(decoder(32, "crop")(saved(image, "PNG")), expected) <= 1


def test_fits() -> None:
    image = noise(30, 60)
    data = saved(image, "PNG")
    padded = decoder(32, "pad")(data)
    assert difference(padded[:, 8:24], image.resize((32, 16), Image.Resampling.BICUBIC)) <= 1
    for row in (*range(8), *range(24, 32)):
        assert padded[:, row].T.tolist() == [list(MEAN)] * 32
    cropped = decoder(32, "crop")(data)
    assert difference(cropped, image.resize((64, 32), Image.Resampling.BICUBIC).crop((16, 0, 48, 32))) <= 1
    assert decoder(32, "stretch")(data).shape == (3, 32, 32)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 9000), st.integers(1, 9000))
def test_a_patch_budget_is_kept_and_used(patches: int, height: int, width: int) -> None:
    sides = PatchBudget(patches, 14).size(height, width)
    rows, columns = (side // 14 for side in sides)
    assert (rows * 14, columns * 14) == sides and 1 <= rows * columns <= patches
    if min(rows, columns) > 1:
        assert (rows + 1) * (columns + 1) > patches
        assert rows / (columns + 1) < height / width < (rows + 1) / columns
    elif height == width:
        assert patches < 4


def test_with_a_budget_an_image_keeps_its_aspect() -> None:
    decode, image = decoder(budget=PatchBudget(24, 4)), noise(40, 60)
    assert difference(decode(saved(image, "PNG")), image.resize((24, 16), Image.Resampling.BICUBIC)) <= 1
    assert [tuple(decode(saved(noise(*size), "PNG")).shape) for size in ((20, 20), (5, 300), (300, 5))] == [
        (3, 16, 16),
        (3, 4, 96),
        (3, 96, 4),
    ]


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (7, 9)])
def test_extreme_aspects_stay_small(fit: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[tuple[int, int]] = []
    interpolate = F.interpolate

    def recorded(image: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
        resized.append(size)
        return interpolate(image, size, **options)

    monkeypatch.setattr(F, "interpolate", recorded)
    result = decoder(64, fit)(image_bytes((10, 20, 30), size))
    assert all(height * width <= 4 * 64 * 64 for height, width in resized)
    assert result.shape == (3, 64, 64)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    assert result[:, 32, 32].tolist() in ([10, 20, 30], list(MEAN))


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = noise(32, 32)
    assert difference(decoder(32)(saved(image, "PNG")), image) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(noise(16, 16, seed=3), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert difference(decoder(16)(data), expected) <= (2 if kind == "JPEG" else 0)


def test_alpha_is_composited_over_white() -> None:
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert decoder()(image_bytes(color, mode=mode)).min() == 255
    half = decoder()(image_bytes((0, 0, 0, 128), mode="RGBA"))
    assert half.unique().tolist() == [127]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert decoder()(saved(palette, "PNG", transparency=1))[1].min() == 255
    assert decoder()(saved(palette, "PNG"))[:, 0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(kind: str) -> None:
    for value, level in ((65535, 255), (257 * 100, 100), (255, 1), (0, 0)):
        image = Image.fromarray(np.full((8, 8), value, np.uint16))
        assert decoder()(saved(image, kind)).unique().tolist() == [level]


def test_gray_cmyk_and_animations() -> None:
    assert decoder()(image_bytes(77, kind="JPEG", mode="L")).unique().tolist() == [77]
    cmyk = decoder()(image_bytes((255, 0, 0, 0), kind="JPEG", mode="CMYK", quality=95))
    assert cmyk[0].max() < 10
    assert cmyk[1].min() > 245
    data = saved(noise(40, 40).convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert difference(decoder(40)(data), image.convert("RGB")) <= 1
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoder()(data)[:, 0, 0].tolist() == [250, 0, 0]
    with pytest.raises(SampleError, match="unsupported_image"):
        decoder()(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_truncated_images(kind: str) -> None:
    data = saved(noise(100, 100), kind)
    for part in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * part)]) in ("truncated_image", "corrupt_image")
    assert reason(b"") == "empty_image"


def test_corrupt_images() -> None:
    assert reason(b"not an image at all") == "corrupt_image"
    png = bytearray(saved(noise(50, 50), "PNG"))
    png[len(png) // 2] ^= 0xFF
    assert reason(bytes(png)) == "corrupt_image"


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    eps = saved(noise(9, 9), "EPS")
    run: list[object] = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *arguments: run.append(arguments) or Image.new("RGB", (9, 9)).im
    )
    with Image.open(io.BytesIO(eps)) as image:
        image.load()
    assert len(run) == 1  # Pillow alone runs it
    assert reason(eps) == "corrupt_image"
    assert len(run) == 1


def test_giant_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    jpeg, png = (saved(noise(100, 101), kind) for kind in ("JPEG", "PNG"))
    decoded: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", decoded.append)
        patch.setattr(simplejpeg, "decode_jpeg", lambda data, *options: decoded.append(data))
        assert reason(bomb) == "too_many_pixels"
        assert reason(bomb, max_pixels=10**10) == "too_many_pixels"  # Pillow has a limit of its own
        assert reason(jpeg, max_pixels=10_000) == "too_many_pixels"
        assert reason(png, max_pixels=10_000) == "too_many_pixels"
    assert not decoded
    assert decoder(max_pixels=10_100)(jpeg).shape == (3, 8, 8)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]), st.integers(0, 10**6), st.randoms())
def test_damage_anywhere_gives_an_image_or_a_typed_reason(kind: str, where: int, random: Any) -> None:
    data = bytearray(saved(noise(20, 24), kind))
    for offset in range(4):
        data[(where + 7 * offset) % len(data)] = random.randrange(256)
    try:
        found: object = tuple(decoder()(bytes(data)).shape)
    except SampleError as error:
        found = error.reason
    assert found in ((3, 8, 8), "corrupt_image", "truncated_image", "too_many_pixels", "unsupported_image")
