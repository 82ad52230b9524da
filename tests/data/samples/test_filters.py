"""Check each filter of texts, metadata and headers; none decodes a medium."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.helpers import (
    DECODER,
    NO_MANIFEST,
    SAMPLE,
    build_manifest,
    document_builder,
    encoding,
    image_bytes,
    mmc4,
    pair_builder,
    saved,
    step_loader,
    text_builder,
    write_shard,
)
from tests.data.videos import video_bytes
from trainer.config.data_config import DataConfig, FilterConfig, ImageTextSource, VideoTextSource
from trainer.data.errors import SampleError
from trainer.data.samples.contrastive_rows import ContrastiveBuilder
from trainer.data.samples.image_file import image_size
from trainer.data.samples.pair_rows import PairBuilder
from trainer.data.samples.rows import RowBuilder, sample_rng
from trainer.data.samples.video_decoder import VideoDecoder

METADATA = json.dumps({"similarity": 0.3, "language": "en", "clip": 1}).encode()
PAIR = {"png": image_bytes(size=(40, 20)), "txt": b"a small cat", "json": METADATA}


def one_id(text: str) -> torch.Tensor:
    return torch.tensor([len(text)])


def reason_of(builder: RowBuilder, members: dict[str, bytes]) -> str | None:
    """Return the reason for rejecting a sample, after checking that the row and its length agree on it."""
    reasons = []
    for call in (builder, builder.length):
        try:
            call(members, SAMPLE, sample_rng(0, SAMPLE))
            reasons.append(None)
        except SampleError as error:
            reasons.append(error.reason)
    assert reasons[0] == reasons[1]
    return reasons[0]


CASES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"min_side": 20, "max_aspect": 2.0}, None),
    ({"min_side": 21}, "filtered_min_side"),
    ({"max_aspect": 1.9}, "filtered_max_aspect"),
    ({"min_characters": 11, "max_characters": 11, "min_words": 3, "max_words": 3}, None),
    ({"min_characters": 12}, "filtered_min_characters"),
    ({"max_characters": 10}, "filtered_max_characters"),
    ({"min_words": 4}, "filtered_min_words"),
    ({"max_words": 2}, "filtered_max_words"),
    ({"min_similarity": 0.3, "languages": ("de", "en")}, None),
    ({"min_similarity": 0.31}, "filtered_similarity"),
    ({"min_similarity": 0.9, "similarity_field": "clip"}, None),
    ({"min_similarity": 0.1, "similarity_field": "other"}, "missing_similarity"),
    ({"min_similarity": 0.1, "similarity_field": "language"}, "missing_similarity"),
    ({"languages": ("de",)}, "filtered_language"),
    ({"languages": ("en",), "language_field": "lang"}, "missing_language"),
]


@pytest.mark.parametrize(("settings", "reason"), CASES)
def test_pairs(settings: dict[str, Any], reason: str | None) -> None:
    filters = FilterConfig(**settings)
    assert reason_of(pair_builder(filters=filters), PAIR) == reason
    source = ImageTextSource("pairs", NO_MANIFEST, 1, filters=filters)
    assert reason_of(ContrastiveBuilder(source, one_id, DECODER), PAIR) == reason
    about_images = reason in ("filtered_min_side", "filtered_max_aspect")
    assert reason_of(text_builder(filters=filters), PAIR) == (None if about_images else reason)


def test_missing_and_damaged_metadata() -> None:
    builder = pair_builder(filters=FilterConfig(languages=("en",)))
    assert reason_of(builder, {k: v for k, v in PAIR.items() if k != "json"}) == "missing_json"
    assert reason_of(builder, {**PAIR, "json": b"{"}) == "invalid_json"
    assert reason_of(builder, {**PAIR, "json": b"[1]"}) == "missing_language"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_only_the_header_is_read(kind: str) -> None:
    """Filter a truncated image by the size in its header instead of reporting the damage."""
    data = saved(Image.effect_noise((300, 30), 50).convert("RGB"), kind)[:800]
    assert image_size(data) == (300, 30)
    builder = pair_builder(filters=FilterConfig(max_aspect=3))
    assert reason_of(builder, {"jpg": data, "txt": b"a"}) == "filtered_max_aspect"
    with pytest.raises(SampleError, match="empty_image"):
        image_size(b"")
    with pytest.raises(SampleError, match="corrupt_image"):
        image_size(b"no image")


def video_builder(**settings: Any) -> PairBuilder:
    source = VideoTextSource("videos", NO_MANIFEST, 1, **settings)
    return PairBuilder(source, encoding(), VideoDecoder(source, DECODER))


def test_videos() -> None:
    members = {"mp4": video_bytes(1, size=(64, 32)), "txt": b"a"}
    for settings, reason in (({"min_side": 33}, "filtered_min_side"), ({"max_aspect": 1.5}, "filtered_max_aspect")):
        assert reason_of(video_builder(filters=FilterConfig(**settings)), members) == reason
    assert reason_of(video_builder(), members) is None


def test_documents_lose_images_until_none_is_left() -> None:
    document = mmc4(["one", "two", "three"], [0, 1, 2])
    document["1.png"] = image_bytes(size=(100, 10))
    builder = document_builder(filters=FilterConfig(max_aspect=3))
    row = builder(document, SAMPLE, sample_rng(0, SAMPLE))
    assert len(row.media) == 2 and int(row.media_index.max()) == 1
    assert int(row.media[1][0, 0, 0, 0]) == 30  # the gray of the third image
    assert builder.length(document, SAMPLE, sample_rng(0, SAMPLE)) == len(row.input_ids)
    assert reason_of(document_builder(filters=FilterConfig(min_side=20)), mmc4(["a"], [0])) == "filtered_min_side"
    assert reason_of(document_builder(filters=FilterConfig(min_words=4)), document) == "filtered_min_words"
    assert reason_of(document_builder(filters=FilterConfig(max_words=3)), document) is None


def test_filtered_samples_are_counted_and_replaced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = rng.choice([4, 16], 60)
    samples = ((f"{n}", {"png": image_bytes(size=(side, side)), "txt": b"x"}) for n, side in enumerate(sides))
    write_shard(tmp_path / "a.tar", samples)
    filters = FilterConfig(min_side=8)
    data = DataConfig((ImageTextSource("pairs", build_manifest(tmp_path), 6, filters=filters),))
    builders = {"pairs": pair_builder(filters=filters)}
    seen = []
    for _ in range(2):
        batches = [batch for step in step_loader(data, builders) for batch in step.micro_batches]
        seen.append([sample for batch in batches for sample in batch.samples])
        rejected = sum((batch.rejected for batch in batches), Counter[str]())
    assert seen[0] == seen[1] and len(seen[0]) == 60
    assert all(sides[sample.index] == 16 for sample in seen[0])
    assert set(rejected) == {"filtered_min_side"} and rejected.total() >= int((sides == 4).sum())
