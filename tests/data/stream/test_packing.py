"""Packed rows: what is chosen, what a row holds, and that neither ranks, workers nor restarts change it."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.helpers import (
    BOS,
    PAD,
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
from trainer.config.data_config import DataConfig, FilterConfig, ImageTextSource, InterleavedSource, TextSource
from trainer.data.batch import Batch, BatchFormat
from trainer.data.errors import TooManyBadSamplesError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.stream.loader import StepLoader
from trainer.data.stream.packing import LanePosition, first_fit, num_looks
from trainer.data.stream.stream_state import check_data_state, merge_lane_positions, saved_lane_positions

STEPS = 8
FILTERS = FilterConfig(max_characters=60)
BUILDERS: dict[str, Any] = {
    "pairs": pair_builder(max_tokens=96, filters=FILTERS),
    "documents": document_builder(max_tokens=128, p_next=0.5),
    "text": text_builder(max_tokens=64),
}


def rows_of(lengths: list[int], max_tokens: int, rows: int) -> tuple[list[tuple[int, ...]], list[LanePosition]]:
    position, chosen, positions = LanePosition(), [], []
    for _ in range(rows):
        row, position = first_fit(position, lambda i: lengths[i % len(lengths)], max_tokens)
        chosen.append(row)
        positions.append(position)
    return chosen, positions


def test_first_fit_by_hand() -> None:
    # 6 + 3 fill ten but for one; the 4 waits and starts the next row.
    chosen, positions = rows_of([6, 4, 5, 9, 3, 2, 1], 10, 3)
    assert chosen[0] == (0, 1)
    assert positions[0] == LanePosition(2, 0)
    assert chosen[1] == (2, 4)  # 5 + 3, and 9 does not fit; then less than three tokens are left
    assert positions[1] == LanePosition(3, 0b10)
    assert chosen[2] == (3,)
    assert positions[2] == LanePosition(5, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.integers(40, 120), st.integers(1, 40))
def test_first_fit_takes_every_sample_once_and_none_waits_for_ever(lengths: list[int], room: int, rows: int) -> None:
    chosen, positions = rows_of(lengths, room, rows)
    taken = [ordinal for row in chosen for ordinal in row]
    assert len(taken) == len(set(taken)) and all(chosen)
    for row, after in zip(chosen, positions, strict=True):
        assert sum(lengths[i % len(lengths)] for i in row) <= room
        done = set(taken[: taken.index(row[-1]) + 1])
        assert set(range(after.ordinal)) <= done and after.ordinal not in done
        assert done == set(range(after.ordinal)) | {after.ordinal + i for i in range(200) if after.consumed >> i & 1}
    starts = [LanePosition(), *positions]
    assert all(row[0] == start.ordinal for row, start in zip(chosen, starts, strict=False))


def test_positions_survive_json() -> None:
    position = LanePosition(2**60, 1 << 200 | 5)
    assert LanePosition.from_json(json.loads(json.dumps(position.to_json()))) == position


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 5 to 33 letters, so that rows of a pair have 8 to 36 tokens; some cannot be used."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)

    def pair(number: int) -> dict[str, bytes]:
        image = image_bytes((number % 256,) * 3)
        if number % 16 == 3:
            image = image[:40]  # found in decoding, when the row is chosen already
        text = ("x" * 70 if number % 16 == 7 else "abcdefgh " * 8)[: 70 if number % 16 == 7 else rng.integers(5, 34)]
        return {"png": image, "txt": b"caf\xe9" if number % 16 == 11 else text.strip().encode()}

    for shard in range(4):
        write_shard(folder / f"pairs/{shard}.tar", ((f"{n:04d}", pair(n + 100 * shard)) for n in range(100)))
        documents = ((f"{n:04d}", mmc4([f"{shard} {n} {i}" for i in range(n % 3 + 1)], [0])) for n in range(40))
        write_shard(folder / f"documents/{shard}.tar", documents)
    text_shards(folder / "text", [90, 70])
    for name in ("pairs", "documents"):
        build_manifest(folder / name)
    return folder


def config(shards: Path, **changes: Any) -> DataConfig:
    sources = (
        ImageTextSource("pairs", shards / "pairs/manifest.npz", 8, micro_batch_size=1, max_tokens=96, packing=True),
        InterleavedSource("documents", shards / "documents/manifest.npz", 4, max_tokens=128, packing=True),
        TextSource("text", shards / "text/manifest.npz", 8, max_tokens=64, packing=True),
    )
    return DataConfig(
        **{"sources": sources, "seed": 5, "num_lanes": 4, "read_block": 7, "shuffle_window": 40, **changes}
    )


def loader(
    data: DataConfig, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = STEPS, **more: Any
) -> StepLoader:
    return step_loader(data, BUILDERS, rank, world_size, start, stop, **more)


def documents_of(batch: Batch) -> Iterator[list[tuple[object, ...]]]:
    """Of each row, its documents: sample, tokens, labels, its own media_index, its media."""
    samples = iter(batch.samples)
    assert batch.position_ids is not None
    for row in range(len(batch.input_ids)):
        n = int(batch.attention_mask[row].sum())
        starts = [*torch.nonzero(batch.position_ids[row, :n] == 0).flatten().tolist(), n]
        documents: list[tuple[object, ...]] = []
        for start, stop in pairwise(starts):
            index = batch.media_index[row, start:stop]
            used = [int(i) for i in index.unique() if i >= 0]
            local = torch.where(index < 0, index, index - min(used, default=0))
            media = [batch.media[i].flatten().tolist() for i in used]
            labels = batch.labels[row, start:stop].tolist()
            documents.append((next(samples), batch.input_ids[row, start:stop].tolist(), labels, local.tolist(), media))
        yield documents
    assert next(samples, None) is None


def global_batches(data: DataConfig, world_size: int, **options: Any) -> list[dict[str, list[Any]]]:
    """For each step and source, the rows of all ranks in the ranks' order."""
    result: list[dict[str, list[Any]]] = []
    for rank in range(world_size):
        for number, step in enumerate(loader(data, rank, world_size, **options)):
            if rank == 0:
                result.append({source.name: [] for source in data.sources})
            for batch in step.micro_batches:
                result[number][batch.source].extend(documents_of(batch))
    return result


def test_a_row_is_its_documents(shards: Path) -> None:
    for step in loader(config(shards), stop=3):
        for batch in step.micro_batches:
            assert batch.position_ids is not None and "attention_mask" not in batch.inputs
            for row in documents_of(batch):
                for _, ids, labels, index, media in row:
                    assert ids[0] == BOS and labels[0] == -100 and index[0] in (-1, 0)  # type: ignore[index]
                    assert len(media) == (0 if batch.source == "text" else 1)  # type: ignore[arg-type]
                    assert (max(index) >= 0) == bool(media)  # type: ignore[call-overload]
            padding = batch.position_ids[0, int(batch.attention_mask[0].sum()) :]
            assert padding.tolist() == list(range(len(padding)))
            assert batch.num_documents == len(batch.samples)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_rows_do_not_depend_on_ranks_workers_or_iteration(shards: Path) -> None:
    one = global_batches(config(shards), 1)
    for world_size in (2, 4):
        assert global_batches(config(shards), world_size) == one
    for workers in (1, 3):
        assert global_batches(config(shards, num_workers=workers), 2) == one
    again = loader(config(shards), stop=2)
    assert [[list(documents_of(b)) for b in u.micro_batches] for u in again] == [
        [list(documents_of(b)) for b in u.micro_batches] for u in again
    ]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7, 15])
def test_a_resumed_stream_goes_on_exactly(shards: Path, step: int) -> None:
    """Past the first epoch, from the state of a run of two ranks, at another world size."""
    data = config(shards, num_workers=0)
    whole = global_batches(data, 1, stop=20)
    assert {sample.epoch for step in whole for row in step["text"] for sample, *_ in row} >= {0, 1}
    streams = [loader(data, rank, 2, stop=step) for rank in range(2)]
    for stream in streams:
        assert sum(1 for _ in stream) == step
    ranks = [stream.lane_positions for stream in streams]
    state = json.loads(json.dumps(loader(data).state(step, merge_lane_positions(ranks))))
    check_data_state(state, loader(data).state(step))
    assert [len(source["lane_positions"]) for source in state["sources"].values()] == [4, 4, 4]
    resumed = global_batches(data, 4, start=step, stop=20, lane_positions=saved_lane_positions(state))
    assert resumed == whole[step:]


def test_prefetching_does_not_move_the_positions(shards: Path) -> None:
    found = []
    for workers in (0, 2):
        stream = loader(config(shards, num_workers=workers), stop=4)
        assert next(iter(stream)).step == 0
        found.append({name: dict(lanes) for name, lanes in stream.lane_positions.items()})
    assert found[0] == found[1] and all(len(lanes) == 4 for lanes in found[0].values())


def test_every_good_sample_comes_once_an_epoch(shards: Path) -> None:
    data = config(shards)
    data = replace(data, sources=data.sources[:1])
    stream = loader(data, stop=200)
    seen: Counter[int] = Counter()
    rejected: Counter[str] = Counter()
    for step in stream:
        batches = step.micro_batches
        samples = [sample for batch in batches for sample in batch.samples if sample.epoch == 0]
        seen.update(sample.index + 100 * int(sample.shard[0]) for sample in samples)
        rejected += sum((batch.rejected for batch in batches), Counter())
        if not samples:
            break
    good = {number for number in range(400) if number % 16 not in (3, 7, 11)}
    assert set(seen) == good
    assert set(rejected) == {"corrupt_image", "invalid_utf8", "filtered_max_characters"}
    # Substitutes take places of the bad, or, where none is short enough, leave them empty.
    assert len(good) < seen.total() <= 400


def test_padding_of_captions_of_8_to_40_tokens_in_rows_of_256(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for shard in range(3):
        texts = ("a" * int(rng.integers(5, 38)) for _ in range(500))
        samples = ((f"{n}", {"png": image_bytes(size=(2, 2)), "txt": text.encode()}) for n, text in enumerate(texts))
        write_shard(tmp_path / f"{shard}.tar", samples)
    source = ImageTextSource("pairs", build_manifest(tmp_path), 8, max_tokens=256, packing=True)
    builders = {"pairs": pair_builder(ImageDecoder(2), max_tokens=256)}
    shares = {}
    for pack in (True, False):
        data = DataConfig((replace(source, packing=pack),))
        steps = step_loader(data, builders, stop=15, batch_format=BatchFormat(PAD, 2))
        batches = [step.micro_batches[0] for step in steps]
        lengths = [len(ids) for batch in batches for row in documents_of(batch) for _, ids, *_ in row] if pack else []
        assert not lengths or (min(lengths), max(lengths)) == (8, 40)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        shares[pack] = 1 - tokens / sum(256 * len(batch.input_ids) for batch in batches)
    assert shares[True] <= 0.05 < 0.8 < shares[False]


def test_state_of_other_packing_is_refused(shards: Path) -> None:
    data = config(shards)
    state = loader(data).state(3, {})
    sources = data.sources
    unpacked = replace(data, sources=(replace(sources[0], packing=False), *sources[1:]))
    longer = replace(data, sources=(replace(sources[0], max_tokens=97), *sources[1:]))
    with pytest.raises(ValueError, match="packed_to was 96, is None"):
        check_data_state(state, loader(unpacked).state(3))
    with pytest.raises(ValueError, match="packed_to was None, is 96"):
        check_data_state(loader(unpacked).state(3), state)
    with pytest.raises(ValueError, match="packed_to was 96, is 97"):
        check_data_state(state, loader(longer).state(3))


def test_only_bad_samples_stop_the_stream(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", ((f"{n}", {"png": image_bytes()[:40], "txt": b"x"}) for n in range(40)))
    source = ImageTextSource("pairs", build_manifest(tmp_path), 4, packing=True)
    with pytest.raises(TooManyBadSamplesError, match=r"'pairs'.*corrupt_image"):
        list(loader(DataConfig((source,))))


def test_it_can_be_sent_to_other_processes_at_any_time(shards: Path) -> None:
    stream = loader(config(shards))
    first = next(iter(stream)).micro_batches
    dataset = pickle.loads(pickle.dumps(stream._dataset))
    made = [dataset[number].batch for number in range(len(first))]
    assert [list(documents_of(batch)) for batch in made] == [list(documents_of(batch)) for batch in first]


def test_the_window_grows_with_the_row() -> None:
    assert num_looks(64) == 32 and num_looks(2048) == 512
