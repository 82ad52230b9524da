"""The ledger of a run: the same whatever the number of ranks, loader processes, kills, weights and storage are."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
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
    text_builder,
    text_shards,
    write_shard,
)
from tests.data.http_server import cut, serve, status
from trainer import index
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, TextSource
from trainer.data.batch import SampleId
from trainer.data.errors import TooManyBadSamplesError
from trainer.data.shards.manifest import load_manifest
from trainer.data.stream.bad_sample_limit import BadSampleLimit
from trainer.data.stream.loader import StepLoader
from trainer.data.stream.stream_state import check_data_state

STEPS = 30
BUILDERS: dict[str, Any] = {
    "pairs": pair_builder(space_prefix_probability=0.5),
    "documents": document_builder(max_tokens=24),
    "text": text_builder(max_tokens=30),
}
# What an applied step consumed, and what could not be used: (source, epoch, shard, index, key) each.
Ledger = list[tuple[set[SampleId], int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pairs of which 1 in 7 is bad, 60 documents of which 1 in 9 is, 90 texts: about 2 epochs in 30 steps."""
    folder = tmp_path_factory.mktemp("elastic")
    bad = [{"png": b"", "txt": b"x"}, {"png": image_bytes()[:50], "txt": b"x"}, {"png": image_bytes(), "txt": b"\xff"}]

    def pair(n: int) -> dict[str, bytes]:
        return bad[n // 7 % 3] if n % 7 == 3 else {"png": image_bytes((n, n, n)), "txt": b"pair %d" % n}

    def document(n: int) -> dict[str, bytes]:
        return {"json": b'{"text_list": NaN}'} if n % 9 == 4 else mmc4([f"a {n}", f"b {n}", "c"], [n % 3, 0])

    for shard in range(4):
        write_shard(folder / f"pairs/{shard}.tar", ((f"{n:03d}", pair(n + 25 * shard)) for n in range(25)))
        write_shard(folder / f"documents/{shard}.tar", ((f"{n:03d}", document(n + 15 * shard)) for n in range(15)))
    text_shards(folder / "text", [50, 40])
    build_manifest(folder / "pairs")
    build_manifest(folder / "documents")
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    sources = (
        ImageTextSource("pairs", folder / "pairs/manifest.npz", 8, micro_batch_size=1),
        InterleavedSource("documents", folder / "documents/manifest.npz", 4, weight=0.5),
        TextSource("text", folder / "text/manifest.npz", 4, samples_per_row=2),
    )
    return DataConfig(
        **{"sources": sources, "seed": 3, "num_lanes": 4, "read_block": 6, "shuffle_window": 9, **changes}
    )


def loader(data: DataConfig, rank: int, world_size: int, start: int, stop: int) -> StepLoader:
    return step_loader(data, BUILDERS, rank, world_size, start, stop)


def run(data: DataConfig, world_size: int, start: int = 0, stop: int = STEPS) -> Ledger:
    """What all ranks consumed in each step."""
    ranks: list[Iterator[Any]] = [iter(loader(data, rank, world_size, start, stop)) for rank in range(world_size)]
    ledger = []
    for _ in range(start, stop):
        batches = [batch for one in ranks for batch in next(one).micro_batches]
        samples = [sample for batch in batches for sample in batch.samples]
        ledger.append((set(samples), sum(batch.rejected.total() for batch in batches)))
        assert len(samples) == 8 + 4 + 8
    return ledger


@pytest.fixture(scope="module")
def whole(folder: Path) -> Ledger:
    return run(config(folder), 1)


def test_the_run_is_more_than_an_epoch_with_bad_samples(whole: Ledger) -> None:
    epochs = {name: {s.epoch for samples, _ in whole for s in samples if s.source == name} for name in BUILDERS}
    assert all(len(found) > 1 for found in epochs.values())
    assert sum(bad for _, bad in whole) > 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_steps_and_resumed_at_other_world_sizes(folder: Path, whole: Ledger, seed: int) -> None:
    """Each part goes on from the last checkpoint before its kill, with other weights, as its saved state allows."""
    draw = random.Random(seed)
    ledger: Ledger = []
    saved: dict[str, Any] | None = None
    while len(ledger) < STEPS:
        world_size, workers = draw.choice([1, 2, 4]), draw.choice([0, 0, 1])
        sources = tuple(replace(one, weight=draw.uniform(0.1, 2)) for one in config(folder).sources)
        data = config(folder, sources=sources, num_workers=workers)
        start = len(ledger)
        state = loader(data, 0, world_size, start, STEPS).state(start)
        if saved is not None:
            check_data_state(saved, state)
        killed_at = min(STEPS, start + draw.randint(1, 12))
        part = run(data, world_size, start, killed_at)
        checkpoint = killed_at if killed_at == STEPS else draw.randint(start, killed_at)
        ledger += part[: checkpoint - start]
        assert part[checkpoint - start :] == whole[checkpoint:killed_at]  # these are made again
        saved = json.loads(json.dumps(loader(data, 0, world_size, 0, STEPS).state(checkpoint)))
        assert all(len(json.dumps(one)) <= 1024 for one in saved["sources"].values())
    assert ledger == whole


def test_state_stays_small_and_position_is_one_integer(folder: Path) -> None:
    one = loader(config(folder), 0, 1, 0, 1)
    early, late = one.state(0), one.state(10**12)
    for name in BUILDERS:
        differing = [key for key in early["sources"][name] if early["sources"][name][key] != late["sources"][name][key]]
        assert differing == ["samples_consumed"]
        assert len(json.dumps(late["sources"][name])) <= 1024


def test_every_world_size_stops_at_the_same_step(folder: Path) -> None:
    data = config(folder, max_bad_fraction=0.14, bad_window=100)

    def stopped(world_size: int) -> tuple[int, str]:
        limit = BadSampleLimit(data)
        ranks = [iter(loader(data, rank, world_size, 0, STEPS)) for rank in range(world_size)]
        for step in range(STEPS):
            batches = [batch for one in ranks for batch in next(one).micro_batches]
            consumed = {name: sum(len(b.samples) for b in batches if b.source == name) for name in BUILDERS}
            reasons: dict[tuple[str, str], int] = {}
            for batch in batches:
                for reason, count in batch.rejected.items():
                    reasons[batch.source, reason] = reasons.get((batch.source, reason), 0) + count
            try:
                limit.record(consumed, reasons)
            except TooManyBadSamplesError as error:
                return step, str(error)
        raise AssertionError("it was never stopped")

    first = stopped(1)
    assert first[0] > 3
    assert first == stopped(2) == stopped(4)


def test_the_same_ledger_from_remote_shards_that_fail(
    folder: Path, whole: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(folder) as server:
        for name, shards in (("pairs", "{0..3}"), ("documents", "{0..3}"), ("text", "{0000..0001}")):
            output = tmp_path / name / "manifest.npz"
            urls = server.url(f"{name}/{shards}.tar")
            assert index.main(["--output", str(output), "--processes", "1", urls]) == 0
        data = config(tmp_path, cache_dir=tmp_path / "cache", read_timeout_seconds=1.0)
        server.faults = [cut(500), None, status(503), None, None, status(500), cut(0)]
        remote = run(data, 1, 0, 17) + run(data, 4, 17)

    def without_host(ledger: Ledger) -> list[object]:
        return [
            ({(s.source, s.epoch, s.shard.rpartition("/")[2], s.index, s.key) for s in step}, bad)
            for step, bad in ledger
        ]

    assert load_manifest(tmp_path / "pairs/manifest.npz").has_remote
    # The order knows shards by number, so they differ in their urls alone (and in what is drawn for each sample).
    assert without_host(remote) == without_host(whole)
