"""The loader as the training loop uses it, over real shards with bad samples in them."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from trainer import index
from trainer.config.data_config import DataConfig, ImageTextSource, InterleavedSource, TextSource
from trainer.data.batch import Batch, Row, SampleId
from trainer.data.errors import DataError, SampleError, ShardError, TooManyBadSamplesError
from trainer.data.samples.rows import sample_rng
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.stream.loader import StepLoader
from trainer.data.stream.order import Location, SourceOrder
from trainer.data.stream.stream_state import check_data_state, data_state

STEPS = 6
BUILDERS: dict[str, Any] = {
    "pairs": pair_builder(space_prefix_probability=0.5),
    "documents": document_builder(max_tokens=24, p_next=0.5),
    "text": text_builder(max_tokens=30),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources; about one pair in eight cannot be used."""
    folder = tmp_path_factory.mktemp("shards")

    def pair(number: int) -> dict[str, bytes]:
        image = image_bytes((number % 256,) * 3)
        if number % 16 == 3:
            image = image[:40]
        return {"png": image, "txt": b"caf\xe9" if number % 16 == 11 else f"pair {number}".encode()}

    for shard in range(3):
        write_shard(folder / f"pairs/{shard}.tar", ((f"{n:04d}", pair(n + 40 * shard)) for n in range(40)))
        write_shard(
            folder / f"documents/{shard}.tar",
            ((f"{n:04d}", mmc4([f"{shard} {n} {i} some words" for i in range(3)], [2, n % 2])) for n in range(20)),
        )
    text_shards(folder / "text", [50, 70])
    for name in ("pairs", "documents"):
        build_manifest(folder / name)
    return folder


def config(shards: Path, **changes: Any) -> DataConfig:
    sources = (
        ImageTextSource("pairs", shards / "pairs/manifest.npz", 8, micro_batch_size=1),
        InterleavedSource("documents", shards / "documents/manifest.npz", 8),
        TextSource("text", shards / "text/manifest.npz", 16, samples_per_row=3, max_tokens=30),
    )
    return DataConfig(
        **{"sources": sources, "seed": 5, "num_lanes": 8, "read_block": 7, "shuffle_window": 10, **changes}
    )


def loader(data: DataConfig, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = STEPS) -> StepLoader:
    return step_loader(data, BUILDERS, rank, world_size, start, stop)


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Every row without padding: all that it is, wherever it stands."""
    found: list[tuple[object, ...]] = []
    for batch in batches:
        each = len(batch.samples) // batch.num_documents
        for row in range(batch.num_documents):
            n = int(batch.attention_mask[row].sum())
            index = batch.media_index[row, :n]
            used = [batch.media[i].flatten().tolist() for i in index.unique().tolist() if i >= 0]
            lowest = int(index[index >= 0].min()) if used else 0
            found.append(
                (
                    batch.source,
                    batch.samples[row * each : (row + 1) * each],
                    batch.input_ids[row, :n].tolist(),
                    batch.labels[row, :n].tolist(),
                    torch.where(index < 0, index, index - lowest).tolist(),
                    used,
                )
            )
    return found


def global_batches(data: DataConfig, world_size: int, **options: int) -> list[dict[str, list[tuple[object, ...]]]]:
    """For each step and source, the rows of all ranks, in the ranks' order."""
    result: list[dict[str, list[tuple[object, ...]]]] = []
    for rank in range(world_size):
        for number, step in enumerate(loader(data, rank, world_size, **options)):
            if rank == 0:
                result.append({})
            for source in ("pairs", "documents", "text"):
                mine = [batch for batch in step.micro_batches if batch.source == source]
                result[number].setdefault(source, []).extend(rows(mine))
    return result


def test_global_batches_do_not_depend_on_ranks(shards: Path) -> None:
    one = global_batches(config(shards), 1)
    assert len(one) == STEPS
    assert [len(one[0][s]) for s in ("pairs", "documents", "text")] == [8, 8, 16]
    for world_size in (2, 4, 8):
        assert global_batches(config(shards), world_size) == one


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_global_batches_do_not_depend_on_workers(shards: Path, workers: int) -> None:
    assert global_batches(config(shards, num_workers=workers), 2) == global_batches(config(shards), 2)


def test_the_stream_is_the_orders(shards: Path) -> None:
    data = config(shards)
    data = replace(data, sources=data.sources[2:])
    manifest = load_manifest(data.sources[0].manifest)
    order = SourceOrder(
        "text", manifest.samples, seed=5, num_lanes=8, samples_per_step=48, read_block=7, shuffle_window=10
    )
    for batches in loader(data):
        (batch,) = batches.micro_batches
        expected = [(manifest.url(x.shard), x.index) for lane in order.samples_of(batches.step) for x in lane]
        assert [(sample.shard, sample.index) for sample in batch.samples] == expected


def test_rows_are_built_with_the_samples_own_randomness_and_substitutes(shards: Path) -> None:
    data = config(shards)
    data = replace(data, sources=(replace(data.sources[0], micro_batch_size=8),))
    reader = ShardReader(load_manifest(data.sources[0].manifest))
    order = SourceOrder(
        "pairs", reader.manifest.samples, seed=5, num_lanes=8, samples_per_step=8, read_block=7, shuffle_window=10
    )

    def built(location: Location | None) -> Row | None:
        assert location is not None
        key, members = reader.read(location.shard, location.index)
        sample = SampleId("pairs", location.epoch, reader.manifest.url(location.shard), location.index, key)
        try:
            return BUILDERS["pairs"](members, sample, sample_rng(5, sample))
        except SampleError:
            return None

    replaced_samples = 0
    for batches in loader(data, stop=15):
        (batch,) = batches.micro_batches
        for lane, found in enumerate(rows([batch])):
            row, attempt = built(order.at(lane, batches.step)), 0
            while row is None:
                row, attempt = built(order.substitute(lane, batches.step, attempt)), attempt + 1
            replaced_samples += attempt > 0
            assert found[1:3] == (row.samples, row.input_ids.tolist())
    assert replaced_samples == len([n for n in range(120) if n % 16 in (3, 11)])


def test_a_resumed_stream_goes_on_exactly(shards: Path) -> None:
    """Past the first epoch of every source, at another world size."""
    whole = global_batches(config(shards), 1, stop=20)
    assert whole[7:] == global_batches(config(shards), 4, start=7, stop=20)
    assert {sample.epoch for step in whole for row in step["pairs"] for sample in row[1]} == {0, 1}


def test_micro_batches_are_equally_many_and_in_source_order(shards: Path) -> None:
    for world_size, expected in ((1, 10), (4, 4)):
        assert loader(config(shards), 0, world_size).micro_batches_per_step == expected
        for rank in range(world_size):
            for step in loader(config(shards), rank, world_size, stop=2):
                names = [batch.source for batch in step.micro_batches]
                assert names == ["pairs"] * (expected - 2) + ["documents", "text"]


def test_an_epoch_visits_every_good_sample_once(shards: Path) -> None:
    data = config(shards)
    data = replace(data, sources=(data.sources[0],), num_workers=0)
    steps = list(loader(data, stop=15))  # 120 pairs, 8 an step
    seen = [sample.index + 40 * int(sample.shard[0]) for u in steps for b in u.micro_batches for sample in b.samples]
    good = [number for number in range(120) if number % 16 not in (3, 11)]
    assert set(seen) == set(good)
    assert len(seen) == 120  # substitutes took the places of the bad ones
    rejected = sum((b.rejected for u in steps for b in u.micro_batches), start=Counter[str]())
    # A substitute may be bad itself, and is then counted again.
    assert set(rejected) == {"corrupt_image", "invalid_utf8"}
    assert rejected.total() >= 120 - len(good)


def test_skips_are_logged_once_a_reason(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer.data.stream.loader"):
        steps = list(loader(config(shards, num_workers=2), stop=12))
    assert sum(sum(b.rejected.values()) for u in steps for b in u.micro_batches) > 5
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert sorted(message.split("(")[1].split(")")[0] for message in messages) == ["corrupt_image", "invalid_utf8"]
    assert all("shard=" in m and "index=" in m and "key='00" in m for m in messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_samples_stop_the_stream(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "a.tar", ((f"{n}", {"png": b"", "txt": b"x"}) for n in range(40)))
    data = DataConfig((ImageTextSource("pairs", build_manifest(tmp_path), 4),), num_workers=workers)
    with pytest.raises(TooManyBadSamplesError, match=r"'pairs'.*empty_image"):
        list(loader(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shards_are_never_substituted(tmp_path: Path, workers: int) -> None:
    data = DataConfig((TextSource("text", text_shards(tmp_path, [40, 40]), 4),), num_workers=workers)
    (tmp_path / "0001.tar").unlink()
    with pytest.raises(ShardError, match=r"0001\.tar of .*manifest\.npz"):
        list(loader(data))
    assert issubclass(ShardError, DataError)


def test_defects_of_a_builder_are_not_skips(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(members: object, sample: SampleId, rng: object) -> Row:
        raise ZeroDivisionError

    monkeypatch.setitem(BUILDERS, "text", broken)
    with pytest.raises(ZeroDivisionError):
        list(loader(config(shards)))


def test_sizes_that_do_not_fit_are_told_together(shards: Path) -> None:
    data = config(shards, num_lanes=None)
    bad = replace(
        data,
        sources=(
            replace(data.sources[0], batch_size=12),
            replace(data.sources[1], micro_batch_size=3),
            data.sources[2],
        ),
    )
    with pytest.raises(ValueError) as caught:
        loader(bad, world_size=8)
    message = str(caught.value)
    assert "data.sources.0.batch_size: batch_size 12 of pairs" in message
    assert "data.sources.1.micro_batch_size: 3 does not divide" in message
    with pytest.raises(ValueError, match=r"data\.sources\.0\.batch_size.*data\.num_lanes 3"):
        loader(config(shards, num_lanes=3), world_size=1)
    with pytest.raises(ValueError, match=r"'pairs' has 120 samples.*data\.num_lanes"):
        loader(replace(data, sources=(replace(data.sources[0], batch_size=128),)))
    with pytest.raises(ValueError, match="no builder for the sources other"):
        loader(replace(data, sources=(replace(data.sources[0], name="other"),)))


def test_loader_processes_can_be_started_by_spawn(shards: Path) -> None:
    """As Python 3.14 does by default (forkserver): everything travels by pickle."""
    first = next(iter(loader(config(shards))))
    dataset = pickle.loads(pickle.dumps(loader(config(shards))._dataset))
    made = [dataset[number] for number in range(len(first.micro_batches))]
    assert [rows([one.batch]) for one in made] == [rows([batch]) for batch in first.micro_batches]


def test_iterating_twice_gives_the_same(shards: Path) -> None:
    one = loader(config(shards), stop=2)
    assert len(one) == 2
    assert [rows(u.micro_batches) for u in one] == [rows(u.micro_batches) for u in one]
    assert list(loader(config(shards), start=3, stop=3)) == []


def test_state_is_small_and_plain(shards: Path) -> None:
    data = config(shards)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    state = data_state(data, manifests, 7)
    assert json.loads(json.dumps(state)) == state
    assert all(len(json.dumps(one)) < 1024 for one in state["sources"].values())
    assert {name: one["samples_consumed"] for name, one in state["sources"].items()} == {
        "pairs": 56,
        "documents": 56,
        "text": 7 * 48,
    }
    check_data_state(json.loads(json.dumps(state)), data_state(replace(data, num_workers=3, prefetch=9), manifests, 7))
    others = (replace(data.sources[0], weight=0.2, micro_batch_size=2), *data.sources[1:])
    check_data_state(state, data_state(replace(data, sources=others), manifests, 7))


def test_state_of_other_data_is_refused_with_both_values(shards: Path, tmp_path: Path) -> None:
    data = config(shards)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    state = data_state(data, manifests, 7)
    sources = data.sources
    cases: list[tuple[DataConfig, str]] = [
        (replace(data, seed=6), "seed was 5, is 6"),
        (replace(data, shuffle_window=11), "shuffle_window was 10, is 11"),
        (replace(data, read_block=8), "read_block was 7, is 8"),
        (replace(data, num_lanes=4), "num_lanes was 8, is 4"),
        (replace(data, sources=(replace(sources[0], batch_size=16), *sources[1:])), "batch_size was 8, is 16"),
        (replace(data, sources=(*sources[:2], replace(sources[2], samples_per_row=2))), "samples_per_row was 3, is 2"),
        (replace(data, sources=(*sources[:2], replace(sources[2], name="prose"))), "'text' is gone.*'prose' is new"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            check_data_state(state, data_state(changed, manifests, 7))
    with pytest.raises(ValueError, match="is gone"):
        check_data_state(state, data_state(replace(data, sources=sources[:2]), manifests[:2], 7))
    other = load_manifest(text_shards(tmp_path, [50, 71]))
    with pytest.raises(ValueError, match=r"source 'text': manifest_sha256 was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        check_data_state(state, data_state(data, [*manifests[:2], other], 7))
    with pytest.raises(ValueError, match="order_version was 0"):
        check_data_state({**state, "order_version": 0}, state)
    with pytest.raises(ValueError, match="samples_consumed was 56, is 64"):
        check_data_state(state, data_state(data, manifests, 8))


def test_state_of_data_that_moved_is_accepted(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(shards)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    state = data_state(data, manifests, 7)
    shutil.copytree(shards / "text", tmp_path / "elsewhere")
    build_manifest(tmp_path / "elsewhere")
    (tmp_path / "lists").mkdir()
    output = tmp_path / "lists/manifest.npz"
    assert index.main(["--output", str(output), "--processes", "1", str(tmp_path / "elsewhere/*.tar")]) == 0
    moved = [*manifests[:2], load_manifest(output)]
    assert moved[2].sha256 != manifests[2].sha256
    check_data_state(state, data_state(data, moved, 7))
    assert "source 'text': its shards have moved" in caplog.text
    names = [str(tmp_path / f"elsewhere/{number}.tar") for number in ("0001", "0000")]
    assert index.main(["--output", str(output), "--processes", "1", *names]) == 0
    with pytest.raises(ValueError, match=r"content_sha256 was.*same order"):
        check_data_state(state, data_state(data, [*manifests[:2], load_manifest(output)], 7))


def test_state_of_a_checkpoint_without_the_content_digest(shards: Path) -> None:
    data = config(shards)
    manifests = [load_manifest(source.manifest) for source in data.sources]
    state = data_state(data, manifests, 7)
    for source in state["sources"].values():
        del source["content_sha256"]
    check_data_state(state, data_state(data, manifests, 7))
    state["sources"]["text"]["manifest_sha256"] = "0"
    with pytest.raises(ValueError, match=r"source 'text': manifest_sha256 was '0'"):
        check_data_state(state, data_state(data, manifests, 7))
