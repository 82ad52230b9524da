"""Decode JPEG and PNG files that one decoder refuses though their pixels are whole, and keep to the memory limit."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.helpers import image_bytes, noise, saved
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.image_file import decode_image, image_size

JPEG, PNG = saved(noise(90, 90), "JPEG"), saved(noise(50, 50), "PNG")
DECODER = ImageDecoder(32)
_PNG_HEAD = 33  # bytes up to the end of IHDR


def jpeg_of_sampling_441() -> bytes:
    """Return a gray JPEG of 16 x 64 pixels with four blocks of luma, one above the other, for each of chroma."""
    data = image_bytes((128, 128, 128), (16, 64), "JPEG", subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    bits = ("001010" * 4 + "0000" * 2) * 4  # in each of 4 units: 4 empty blocks of luma, 2 of chroma
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return data[: frame + 11] + b"\x14" + data[frame + 12 : start] + pixels + b"\xff\xd9"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(added: bytes) -> bytes:
    return PNG[:_PNG_HEAD] + added + PNG[_PNG_HEAD:]


def reason(data: bytes, decoder: ImageDecoder = DECODER) -> str:
    with pytest.raises(SampleError) as caught:
        decoder(data)
    return caught.value.reason


def _jfif_2(data: bytes) -> bytes:
    assert data[6:11] == b"JFIF\0"
    return data[:11] + b"\x02" + data[12:]


def _with_wrong_restart_marker() -> bytes:
    data = saved(noise(90, 90), "JPEG", restart_marker_blocks=4)
    marker = data.index(b"\xff\xd2")
    return data[:marker] + b"\xff\xd5" + data[marker + 2 :]


@pytest.mark.parametrize(
    "data",
    [
        _jfif_2(JPEG),
        JPEG[:-2] + bytes(100) + JPEG[-2:],  # padding before the end mark
        JPEG[:-2],  # no end mark
        JPEG + b"rubbish",
        JPEG[: JPEG.index(b"\xff\xdb")] + b"abc" + JPEG[JPEG.index(b"\xff\xdb") :],
    ],
)
def test_jpeg_whose_pixels_are_whole(data: bytes) -> None:
    assert int((DECODER(data).int() - DECODER(JPEG).int()).abs().max()) <= 1
    assert image_size(data) == (90, 90)


def test_unusual_sampling_and_restart_marker() -> None:
    assert DECODER(jpeg_of_sampling_441())[:, 16, 16].tolist() == [128] * 3
    assert image_size(jpeg_of_sampling_441()) == (16, 64)
    assert DECODER(_with_wrong_restart_marker()).shape == (3, 32, 32)


def test_jpeg_that_lost_pixels() -> None:
    assert reason(_jfif_2(JPEG)[: len(JPEG) // 2]) == "truncated_image"
    assert reason(JPEG[:-300]) == "truncated_image"
    assert reason(JPEG[:700] + JPEG[1000:]) in ("truncated_image", "corrupt_image")
    assert reason(jpeg_of_sampling_441()[:-10]) == "truncated_image"
    restarts = saved(noise(90, 90), "JPEG", restart_marker_blocks=4)
    lost = restarts.index(b"\xff\xd2")
    assert reason(restarts[:lost] + restarts[lost + 2 :]) == "corrupt_image"


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    large = saved(noise(1100, 1100), "JPEG", progressive=True)
    assert DECODER(large).shape == (3, 32, 32)
    scan = large[large.rindex(b"\xff\xda") : -2]
    assert reason(large[:-2] + scan * 150 + large[-2:]) == "corrupt_image"


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"tEXt", b"a\0" + b"x" * 3_000_000),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"a\0hello")[:-1] + b"?",  # a wrong checksum
        chunk(b"gAMA", b"1"),
        chunk(b"pHYs", b"1"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    ],
)
def test_png_metadata_do_not_matter(added: bytes) -> None:
    data = with_chunk(added)
    assert torch.equal(DECODER(data), DECODER(PNG))
    assert image_size(data) == (50, 50)
    assert reason(data[:-200]) == "truncated_image"


def test_png_keeps_transparency_and_orientation_without_its_other_metadata() -> None:
    damaged = chunk(b"tEXt", b"a\0hello")[:-1] + b"?"
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    turned = with_chunk(damaged + chunk(b"eXIf", exif))
    assert torch.equal(DECODER(turned), DECODER(with_chunk(chunk(b"eXIf", exif))))
    assert not torch.equal(DECODER(turned), DECODER(PNG))
    clear = image_bytes((0, 0, 0), (8, 8), transparency=(0, 0, 0))
    assert DECODER(clear[:_PNG_HEAD] + damaged + clear[_PNG_HEAD:]).min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16"])
def test_conversion_in_bands_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "I;16":
        gray = np.array(noise(60, 40).convert("L")).astype(np.uint16) * 250
        data = saved(Image.fromarray(gray), "PNG")
    else:
        image = noise(60, 40).convert(mode.replace("A", "")) if mode != "P" else noise(60, 40).convert("P")
        if mode.endswith("A"):
            image.putalpha(noise(60, 40, 1).convert("L"))
        data = saved(image, "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = decode_image(data, DECODER.check_pixels)
    monkeypatch.setattr("trainer.data.samples.image_file._BAND_PIXELS", 7 * 40)
    assert np.array_equal(decode_image(data, DECODER.check_pixels), whole)


def test_a_tile_that_is_larger_than_its_image() -> None:
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 200, 325: 20}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)).ljust(220, b"\0")
    assert reason(data) == "too_many_pixels"


_MEASURE = """
import io, resource, sys
import torch
from PIL import Image
from trainer.data.samples.image_decoder import ImageDecoder
torch.set_num_threads(1)
decoder, side, kind = ImageDecoder(64), 3000, sys.argv[1]
ramp = Image.linear_gradient("L").resize((side, side))
buffer, small = io.BytesIO(), io.BytesIO()
frames = {"save_all": True, "append_images": [ramp.rotate(90).convert("RGBA")]}
match kind:
    case "progressive":
        ramp.convert("CMYK").save(buffer, "JPEG", progressive=True, subsampling=0)
    case "RGBA":
        Image.merge("RGBA", [ramp] * 4).save(buffer, "PNG", compress_level=1)
    case "I;16":
        ramp.convert("I;16").save(buffer, "PNG", compress_level=1)
    case "GIF":
        ramp.save(buffer, "GIF", **frames)
    case "WEBP":
        ramp.convert("RGBA").save(buffer, "WEBP", quality=1, method=0, **frames)
ramp.resize((200, 200)).convert("RGB").save(small, "PNG")
decoder(small.getvalue())
del ramp, frames
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 24 * side * side + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(decoder(buffer.getvalue()).shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["progressive", "RGBA", "I;16", "GIF", "WEBP"])
def test_memory_is_bounded_by_the_pixels(kind: str) -> None:
    """``data.max_pixels`` promises at most 24 bytes a pixel, whatever the format."""
    result = subprocess.run([sys.executable, "-c", _MEASURE, kind], capture_output=True, text=True, check=False)
    assert result.stdout == "torch.Size([3, 64, 64])\n", result.stderr[-500:]
