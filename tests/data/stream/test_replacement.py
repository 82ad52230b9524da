"""Runs whose filters keep a minority, and bad samples at the edges of lanes: what goes on, what stops, what is said."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.helpers import (
    build_manifest,
    document_builder,
    image_bytes,
    mmc4,
    pair_builder,
    step_loader,
    write_shard,
)
from trainer.config.data_config import DataConfig, FilterConfig, ImageTextSource, InterleavedSource
from trainer.data.batch import Batch
from trainer.data.errors import NoSamplesLeftError, TooManyBadSamplesError
from trainer.data.stream.bad_sample_limit import BadSampleLimit

IMAGE = image_bytes(size=(2, 2))


def manifest_of(folder: Path, texts: list[bytes]) -> Path:
    write_shard(folder / "0.tar", ((f"{n:05d}", {"png": IMAGE, "txt": text}) for n, text in enumerate(texts)))
    return build_manifest(folder)


def batches_of(data: DataConfig, builder: Any, steps: int, world_size: int = 1) -> list[list[Batch]]:
    """Return the batches of each step over all ranks."""
    name = data.sources[0].name
    ranks = [step_loader(data, {name: builder}, rank, world_size, stop=steps) for rank in range(world_size)]
    return [[b for step in ranks_step for b in step.micro_batches] for ranks_step in zip(*ranks, strict=True)]


def kept_source(folder: Path, *, packing: bool, kept_every: int = 50, count: int = 1000) -> tuple[DataConfig, Any]:
    """Return a source whose filter keeps one sample in ``kept_every``."""
    texts = [b"a long caption" if number % kept_every == 7 else b"no" for number in range(count)]
    filters = FilterConfig(min_characters=5)
    source = ImageTextSource("pairs", manifest_of(folder, texts), 8, packing=packing, filters=filters)
    data = DataConfig((source,), num_lanes=4, shuffle_window=20, read_block=5, max_bad_fraction=0.0)
    return data, pair_builder(filters=filters)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_filters_that_keep_two_percent_train_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packing: bool
) -> None:
    data, builder = kept_source(tmp_path, packing=packing)
    one = batches_of(data, builder, 6)
    messages = [record.getMessage() for record in caplog.records if "filters keep" in record.getMessage()]
    assert len(messages) == 1 and "filtered_min_characters" in messages[0]
    assert 0.5 < float(messages[0].split(" %")[0].split()[-1]) < 8
    limit = BadSampleLimit(data)
    for step in one:
        samples = [sample for batch in step for sample in batch.samples]
        assert len(samples) >= 8 and all(sample.index % 50 == 7 for sample in samples)
        replaced = sum((batch.rejected for batch in step), Counter[str]())
        assert set(replaced) == {"filtered_min_characters"}
        limit.record({"pairs": len(samples)}, {("pairs", reason): n for reason, n in replaced.items()})
    for world_size in (2, 4):
        other = batches_of(data, builder, 6, world_size)
        assert [[s for b in step for s in b.samples] for step in other] == [
            [s for b in step for s in b.samples] for step in one
        ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packing", [False, True])
def test_filters_that_leave_nothing_end_with_their_names(tmp_path: Path, packing: bool, workers: int) -> None:
    filters = FilterConfig(min_characters=5)
    source = ImageTextSource("pairs", manifest_of(tmp_path, [b"no"] * 90), 4, packing=packing, filters=filters)
    data = DataConfig((source,), shuffle_window=7, num_workers=workers)
    with pytest.raises(NoSamplesLeftError, match=r"'pairs'.*filters leave nothing.*filtered_min_characters 8\d"):
        batches_of(data, pair_builder(filters=filters), 1)


def test_a_long_search_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, builder = kept_source(tmp_path, packing=False, kept_every=3000, count=3000)
    with caplog.at_level(logging.WARNING):
        batches_of(data, builder, 1)
    assert any("1,000 samples in a row cannot be used (filtered_" in one.getMessage() for one in caplog.records)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("window", [1, 10])
def test_one_bad_sample_at_the_end_of_a_lane_is_replaced(tmp_path: Path, window: int, packing: bool) -> None:
    """Lanes of 11 samples end with a window of one; somewhere in the epoch each bad sample stands there."""
    texts = [b"\xff" if number % 11 == 0 else b"good" for number in range(44)]
    source = ImageTextSource("pairs", manifest_of(tmp_path, texts), 4, packing=packing, max_tokens=8)
    data = DataConfig((source,), num_lanes=4, shuffle_window=window, max_bad_fraction=0.2)
    steps = batches_of(data, pair_builder(), 44)
    assert all(sample.index % 11 for step in steps for batch in step for sample in batch.samples)
    assert sum(batch.rejected["invalid_utf8"] for step in steps for batch in step) >= 16


def test_a_source_that_is_bad_stops_long_before_the_end_of_the_epoch(tmp_path: Path) -> None:
    source = ImageTextSource("pairs", manifest_of(tmp_path, [b"\xff"] * 2000), 4)
    with pytest.raises(TooManyBadSamplesError, match=r"'pairs': 17 .*invalid_utf8 17.*data\.max_bad_fraction = 0\.1"):
        batches_of(DataConfig((source,), bad_window=20), pair_builder(), 1)
    with pytest.raises(TooManyBadSamplesError, match=r"all 2,000 samples of an epoch are bad.*invalid_utf8 2,000"):
        batches_of(DataConfig((source,), max_bad_fraction=1.0), pair_builder(), 1)


def test_dropped_images_are_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def document(number: int) -> dict[str, bytes]:
        members = mmc4(["a", "b", "c"], [0, 1, 2])
        return {**members, "1.png": b"broken"} if number % 2 else members

    write_shard(tmp_path / "0.tar", ((f"{n:03d}", document(n)) for n in range(40)))
    for packing in (False, True):
        caplog.clear()
        source = InterleavedSource("documents", build_manifest(tmp_path), 4, packing=packing)
        steps = batches_of(DataConfig((source,), max_bad_fraction=0.0), document_builder(), 5)
        batches = [batch for step in steps for batch in step]
        odd = sum(sample.index % 2 for batch in batches for sample in batch.samples)
        assert sum((batch.dropped_images for batch in batches), Counter[str]()) == {"corrupt_image": odd}
        assert not any(batch.rejected for batch in batches)
        assert sum("image dropped from a document (corrupt_image)" in r.getMessage() for r in caplog.records) == 1


def test_images_beyond_max_images_are_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "0.tar", ((f"{n:03d}", mmc4(["a", "b", "c"], [0, 1, 2])) for n in range(8)))
    source = InterleavedSource("documents", build_manifest(tmp_path), 4, max_images=2)
    steps = batches_of(DataConfig((source,), max_bad_fraction=0.0), document_builder(max_images=2), 2)
    assert [batch.dropped_images for step in steps for batch in step] == [{"filtered_max_images": 4}] * 2
    assert sum("(filtered_max_images)" in record.getMessage() for record in caplog.records) == 1


def test_a_key_that_is_not_utf_8_can_be_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", ((f"caf\udce9{n}", {"png": IMAGE, "txt": b"a"}) for n in range(8)))
    source = ImageTextSource("pairs", build_manifest(tmp_path), 4)
    (batch,) = batches_of(DataConfig((source,)), pair_builder(), 1)[0]
    assert all(json.dumps(sample.key, ensure_ascii=False).encode() for sample in batch.samples)
    assert {sample.key[:-1] for sample in batch.samples} == {r"caf\udce9"}
