"""Make small real shards, images, tokens and row builders for the data tests."""

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
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, TextSource
from trainer.data.batch import BatchFormat, SampleId
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.samples.interleaved_rows import InterleavedBuilder
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import RowBuilder
from trainer.data.samples.text_encoding import TextEncoding
from trainer.data.samples.text_rows import TextBuilder
from trainer.data.stream.loader import StepLoader

BOS, EOS, PAD, IMAGE, EOC = 1, 2, 3, 4, 5
FIRST_TEXT_ID = 10
SAMPLE = SampleId("source", 0, "a.tar", 0, "doc")
DECODER = ImageDecoder(8)
FORMAT = BatchFormat(PAD, 8)
NO_MANIFEST = Path("none.npz")  # of sources whose builder alone is tested


def bytes_as_ids(text: str) -> list[int]:
    """Encode each byte of a text as one token."""
    return [FIRST_TEXT_ID + byte for byte in text.encode()]


def text_of(ids: Iterable[int]) -> str:
    """Decode ids to text, with B, E, P, # (image) and | (end of chunk) for the special tokens."""
    special = {BOS: "B", EOS: "E", PAD: "P", IMAGE: "#", EOC: "|"}
    return "".join(special.get(i) or chr(i - FIRST_TEXT_ID) for i in map(int, ids))


def encoding() -> TextEncoding:
    """Return bytes as tokens, with every special token."""
    return TextEncoding(bytes_as_ids, BOS, EOS, PAD, IMAGE, EOC)


def pair_builder(decoder: ImageDecoder = DECODER, **settings: Any) -> PairBuilder:
    """Return the builder of an image-text source with these settings."""
    return PairBuilder(ImageTextSource("pairs", NO_MANIFEST, 1, **settings), encoding(), decoder)


def document_builder(decoder: ImageDecoder = DECODER, **settings: Any) -> InterleavedBuilder:
    """Return the builder of an interleaved source with these settings."""
    return InterleavedBuilder(InterleavedSource("documents", NO_MANIFEST, 1, **settings), encoding(), decoder)


def text_builder(**settings: Any) -> TextBuilder:
    """Return the builder of a text source with these settings."""
    return TextBuilder(TextSource("text", NO_MANIFEST, 1, **settings), encoding())


def image_bytes(color: Any = (255, 0, 0), size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: Any) -> bytes:
    """Return an encoded image of one color; size is (width, height)."""
    buffer = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return smooth random content, which resizing and compression change."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write a shard with webdataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return path


def text_shards(folder: Path, counts: Iterable[int]) -> Path:
    """Write shards of texts "shard/index", and return their manifest."""
    for shard, count in enumerate(counts):
        write_shard(
            folder / f"{shard:04d}.tar",
            ((f"k{number}", {"txt": f"{shard}/{number}".encode()}) for number in range(count)),
        )
    return build_manifest(folder)


def build_manifest(folder: Path, *options: str) -> Path:
    """Index ``folder/*.tar`` in this process, and return the manifest."""
    output = folder / "manifest.npz"
    assert index.main(["--output", str(output), "--processes", "1", *options, "--", str(folder / "*.tar")]) == 0
    return output


def mmc4(texts: list[str], matches: list[int], **extra: Any) -> dict[str, bytes]:
    """Return a document whose image i is the member ``i.png``, gray of level 10 * (i + 1)."""
    info = [{"image_name": f"{i}.png", "matched_text_index": match} for i, match in enumerate(matches)]
    members = {f"{i}.png": image_bytes((10 * (i + 1),) * 3) for i in range(len(matches))}
    return {"json": json.dumps({"text_list": texts, "image_info": info, **extra}).encode(), **members}


def step_loader(
    data: DataConfig,
    builders: Mapping[str, RowBuilder],
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    stop: int = 10,
    batch_format: BatchFormat = FORMAT,
    **more: Any,
) -> StepLoader:
    """Return the loader of the steps ``start`` to ``stop`` of a rank."""
    return StepLoader(
        data,
        builders,
        batch_format,
        rank=rank,
        world_size=world_size,
        start_step=start,
        stop_step=stop,
        **more,
    )
