"""Damage real files of every kind at random: each gives a row or a SampleError, in bounded time and memory.

The mutations run in a process of their own, because a decoder that crashes takes its process with it.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import SAMPLE, document_builder, mmc4, noise, pair_builder, saved
from tests.data.videos import video_bytes
from trainer.config.data_config import FilterConfig, VideoTextSource
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.sample_members import text_member
from trainer.data.samples.video_decoder import VideoDecoder

Files = list[tuple[bytes, Callable[[bytes], object]]]
_MEMORY = 4 << 30  # bytes of address space beside those of the libraries
_SLOWEST = 20.0  # seconds for one file, on a busy machine


def _image_files() -> Files:
    decoder = ImageDecoder(16, max_pixels=4_000_000)
    picture = noise(40, 56)
    kinds = [
        *[("JPEG", {"quality": 80, "subsampling": sampling}) for sampling in (0, 2)],
        *[("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_blocks": 3})],
        *[("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("PPM", {}), ("AVIF", {"speed": 10})],
        *[("TIFF", {"compression": how}) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
    ]
    files: Files = [(saved(picture, kind, **options), decoder) for kind, options in kinds]
    more = [picture.rotate(90).convert("RGBA").resize((56, 40))]
    files += [
        (saved(picture.convert("RGBA"), kind, save_all=True, append_images=more), decoder)
        for kind in ("GIF", "PNG", "WEBP")
    ]
    return [*files, (saved(picture.convert("CMYK"), "JPEG"), decoder)]


def _video_files() -> Files:
    source = VideoTextSource("videos", document_builder().source.manifest, 1, num_frames=3)
    decoder = VideoDecoder(source, ImageDecoder(16, max_pixels=4_000_000))

    def moving(seconds: float) -> tuple[int, int, int]:
        return int(seconds * 90), 30, 200 - int(seconds * 40)

    kinds = [
        *[("mp4", "libx264"), ("mp4", "mpeg4"), ("mov", "mpeg4"), ("webm", "libvpx"), ("webm", "libvpx-vp9")],
        *[("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "libx264"), ("gif", "gif")],
    ]
    return [
        (
            video_bytes(
                2,
                size=(48, 32),
                container=container,
                codec=codec,
                color=moving,
                pixel_format="rgb8" if codec == "gif" else "yuv420p",
            ),
            lambda data: decoder(data, 0.5),
        )
        for container, codec in kinds
    ]


def _document_files() -> Files:
    document = mmc4(["one sentence.", "another \u00e9", "third"], [0, 2], score=0.5, url="https://a.b/c")
    matrix = json.dumps({**json.loads(document["json"]), "similarity_matrix": [[0.1, 0.2, 0.3]] * 2})
    plain = document_builder(min_similarity=0.1, filters=FilterConfig(min_similarity=0.1, languages=("en",)))

    def build(data: bytes) -> object:
        return document_builder(max_tokens=20)({**document, "json": data}, SAMPLE, np.random.default_rng(0))

    def filtered(data: bytes) -> object:
        return plain({**document, "json": data}, SAMPLE, np.random.default_rng(0))

    def pair(data: bytes) -> object:
        return pair_builder()({"png": document["0.png"], "txt": data}, SAMPLE, np.random.default_rng(0))

    return [
        (document["json"], build),
        (matrix.replace('"matched_text_index"', '"was"').encode(), build),
        (document["json"], filtered),
        ("A caption \u00e9\U0001f642 of a cat.".encode(), pair),
        ("text \u200b".encode(), lambda data: text_member({"txt": data})),
    ]


KINDS = {"images": _image_files, "videos": _video_files, "documents": _document_files}


def mutations(data: bytes, count: int, draw: random.Random) -> Iterator[bytes]:
    """Yield changed copies: bytes replaced, bits flipped, numbers made extreme, parts cut, doubled, moved or lost."""
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 5, 20])):
            place = min(int(draw.random() ** 3 * len(changed)), len(changed) - 1)  # headers stand at the beginning
            length = min(draw.choice([1, 2, 4, 8, 64]), len(changed) - place)
            match draw.randrange(7):
                case 0:
                    changed[place] = draw.randrange(256)
                case 1:
                    changed[place] ^= 1 << draw.randrange(8)
                case 2:
                    changed[place : place + length] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
                case 3:
                    changed[place : place + length] = b""
                case 4:
                    changed[place:place] = changed[place : place + length]
                case 5:
                    source = draw.randrange(len(changed))
                    changed[place : place + length] = changed[source : source + length]
                case _:
                    changed[place:] = changed[place:] if draw.random() < 0.8 else b""
            if not changed:
                break
        yield bytes(changed)


def attack(kind: str, count: int, seed: int) -> None:
    """Decode ``count`` mutations of each file; raises what is not a SampleError."""
    for number, (data, use) in enumerate(KINDS[kind]()):
        use(data) if (kind, number) != ("documents", 2) else None  # that one is filtered
        if number == 0:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
        draw = random.Random(f"{seed} {number}")
        for place, changed in enumerate(mutations(data, count, draw)):
            print(kind, number, place, file=sys.stderr, flush=True)  # the last line names the file of a crash
            start = time.monotonic()
            try:
                use(changed)
            except SampleError:
                pass
            assert time.monotonic() - start < _SLOWEST, f"{kind} {number}, mutation {place}"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("images", 400), ("videos", 150), ("documents", 1500)])
def test_damaged_files_never_crash_hang_or_raise_anything_else(kind: str, count: int) -> None:
    command = f"from tests.data.samples.test_fuzzing import attack; attack({kind!r}, {count}, 0)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
