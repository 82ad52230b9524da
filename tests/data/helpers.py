"""Small real shards, images and tokens for the data tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from trainer import index
from trainer.config.data_config import DataConfig
from trainer.data.batch import SampleId
from trainer.data.samples.row_builder import Builder
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.stream.loader import StepLoader

BOS, EOS, PAD, IMAGE, EOC = 1, 2, 3, 4, 5
FIRST_TEXT_ID = 10
SAMPLE = SampleId("source", 0, "a.tar", 0, "doc")


def bytes_as_ids(text: str) -> list[int]:
    """A tokenizer whose tokens are bytes."""
    return [FIRST_TEXT_ID + byte for byte in text.encode()]


def text_of(ids: Iterable[int]) -> str:
    """Readable: text, and the special tokens as B, E, P, # (image) and | (end of chunk)."""
    special = {BOS: "B", EOS: "E", PAD: "P", IMAGE: "#", EOC: "|"}
    return "".join(special.get(i) or chr(i - FIRST_TEXT_ID) for i in map(int, ids))


def encoding() -> TextEncoding:
    """Bytes as tokens, with every special token."""
    return TextEncoding(bytes_as_ids, BOS, EOS, PAD, IMAGE, EOC)


def image_bytes(color: Any = (255, 0, 0), size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: Any) -> bytes:
    """A picture of one color; size is (width, height)."""
    buffer = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random content, so that resizing and compression have something to do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """With webdataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return path


def text_shards(folder: Path, counts: Iterable[int]) -> Path:
    """Shards of texts "shard/index" -> their manifest."""
    for shard, count in enumerate(counts):
        write_shard(
            folder / f"{shard:04d}.tar",
            ((f"k{number}", {"txt": f"{shard}/{number}".encode()}) for number in range(count)),
        )
    return build_manifest(folder)


def build_manifest(folder: Path, *options: str) -> Path:
    """Indexes ``folder/*.tar`` in this process."""
    output = folder / "manifest.npz"
    assert index.main(["--output", str(output), "--processes", "1", *options, "--", str(folder / "*.tar")]) == 0
    return output


def mmc4(texts: list[str], matches: list[int], **extra: Any) -> dict[str, bytes]:
    """A document whose image i is the member ``i.png``, gray of level 10 * (i + 1)."""
    info = [{"image_name": f"{i}.png", "matched_text_index": match} for i, match in enumerate(matches)]
    members = {f"{i}.png": image_bytes((10 * (i + 1),) * 3) for i in range(len(matches))}
    return {"json": json.dumps({"text_list": texts, "image_info": info, **extra}).encode(), **members}


def step_loader(
    data: DataConfig,
    builders: Mapping[str, Builder],
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    stop: int = 10,
    **more: Any,
) -> StepLoader:
    """The updates ``start`` to ``stop`` of a rank, padded with ``PAD``, dummies of 8 x 8 pixels unless told."""
    return StepLoader(
        data,
        builders,
        rank=rank,
        world_size=world_size,
        start_step=start,
        stop_step=stop,
        **{"pad_id": PAD, "media_shape": (1, 3, 8, 8), **more},
    )
