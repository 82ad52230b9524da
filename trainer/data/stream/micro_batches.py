"""Micro-batch i of a rank, as a map-style dataset: any process can make any of them, in any order, alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from trainer.config.data_config import DataConfig
from trainer.data.batch import Batch, RejectedSample, Row, SampleId, collate
from trainer.data.errors import DataError, SampleError
from trainer.data.samples.row_builder import Builder, join, sample_rng
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage import StorageSettings, check_cache_size
from trainer.data.stream.order import Location, SourceOrder, lanes_of
from trainer.data.stream.packed_rows import PackedRows, too_many_bad_samples
from trainer.data.stream.packing import LanePosition, LanePositions
from trainer.data.stream.prefetch import BlockPrefetcher
from trainer.data.stream.step_plan import build_orders, plan_step

SUBSTITUTES = 16  # with half of all samples bad, sixteen in a row happen once in 65,000


class MicroBatch(NamedTuple):
    """A batch and what was replaced in it."""

    batch: Batch
    rejected: tuple[RejectedSample, ...]


class MicroBatches(Dataset[MicroBatch | DataError]):
    """Index ``step * micro_batches_per_step + number`` -> MicroBatch, or the error that stops the stream.

    The numbers of an update run through the sources in their order, and through each source's micro-batches.
    The error is returned, since torch would raise another one around it, with a worker's traceback as its message.
    Of packed sources, a process goes through the lanes' texts from start_step on, where lane_positions (by source and
    lane) are known; without any, that is the start of the order. Where data.num_workers divides the micro-batches of an
    update, each process meets the same lanes in every update and none does it twice.
    Raises ValueError when sizes do not fit.
    """

    def __init__(
        self,
        config: DataConfig,
        builders: Mapping[str, Builder],
        manifests: Sequence[Manifest],
        *,
        pad_id: int,
        media_shape: tuple[int, int, int, int],
        rank: int,
        world_size: int,
        start_step: int = 0,
        lane_positions: Mapping[str, LanePositions] | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.patch_size = patch_size
        self.config, self.builders, self.pad_id, self.media_shape = config, builders, pad_id, media_shape
        self.plans = plan_step(config, world_size)
        self.orders = build_orders(config, self.plans, manifests)
        storage = StorageSettings.of(config)
        self.readers = tuple(ShardReader(manifest, storage=storage) for manifest in manifests)
        self._prefetchers = tuple(
            BlockPrefetcher(manifest, order, storage) for manifest, order in zip(manifests, self.orders, strict=True)
        )
        self._lanes = [lanes_of(rank, world_size, plan.lanes) for plan in self.plans]
        for plan, manifest, lanes in zip(self.plans, manifests, self._lanes, strict=True):
            check_cache_size(manifest, storage, len(lanes), config.shuffle_window, f"source {plan.source.name!r}")
        positions = lane_positions or {}
        self._packed = {
            number: self._pack(number, start_step, positions.get(plan.source.name, {}))
            for number, plan in enumerate(self.plans)
            if plan.source.packing
        }
        self._slots = [(number, micro) for number, plan in enumerate(self.plans) for micro in range(plan.micro_batches)]

    @property
    def micro_batches_per_step(self) -> int:
        """Of all sources together; the same for every rank and step."""
        return len(self._slots)

    def prepare(self, step: int) -> None:
        """Before loader processes are forked: the orders that they will share instead of each making its own."""
        for order in self.orders:
            order.prepare(step)

    def __getitem__(self, index: int) -> MicroBatch | DataError:
        try:
            return self._micro_batch(index)
        except DataError as error:
            return error

    def _micro_batch(self, index: int) -> MicroBatch:
        step, number = divmod(index, len(self._slots))
        source, micro = self._slots[number]
        plan = self.plans[source]
        rejected: list[RejectedSample] = []
        positions: dict[int, LanePosition] = {}
        rows = []
        for row in range(micro * plan.micro_batch_size, (micro + 1) * plan.micro_batch_size):
            lane = self._lanes[source][row // plan.rows_per_lane]
            lanes_row = step * plan.rows_per_lane + row % plan.rows_per_lane
            if source in self._packed:
                packed, positions[lane] = self._packed[source].row(lane, lanes_row, rejected)
                rows.append(packed)
            else:
                first = lanes_row * plan.samples_per_row
                parts = [self._sample(source, lane, first + offset, rejected) for offset in range(plan.samples_per_row)]
                rows.append(join(parts, plan.source.max_tokens))
        patch = self.patch_size if plan.keeps_aspect else None
        batch = collate(
            rows,
            source=plan.source.name,
            pad_id=self.pad_id,
            media_shape=(plan.frames, *self.media_shape[1:]) if patch is None else (plan.frames, 3, patch, patch),
            patch_size=patch,
            rejected=Counter(one.reason for one in rejected),
            lane_positions=positions,
        )
        return MicroBatch(batch, tuple(rejected))

    def _pack(self, source: int, start_step: int, positions: LanePositions) -> PackedRows:
        plan = self.plans[source]
        return PackedRows(
            plan.source.name,
            self.builders[plan.source.name],
            partial(self._candidates, source),
            seed=self.config.seed,
            max_tokens=plan.source.max_tokens,
            first_row=start_step * plan.rows_per_lane,
            positions=positions,
        )

    def _sample(self, source: int, lane: int, position: int, rejected: list[RejectedSample]) -> Row:
        name = self.plans[source].source.name
        failed: list[RejectedSample] = []
        for sample, members in self._candidates(source, lane, position):
            try:
                built = self.builders[name](members, sample, sample_rng(self.config.seed, sample))
            except SampleError as error:
                failed.append(RejectedSample(error.reason, error.detail, sample))
                continue
            rejected.extend(failed)
            return built
        raise too_many_bad_samples(name, failed)

    def _candidates(
        self, source: int, lane: int, position: int, first: int = 0
    ) -> Iterator[tuple[SampleId, dict[str, bytes]]]:
        """The sample that the order has at a place, then its substitutes; ``first`` leaves out that many of these."""
        order = self.orders[source]
        self._prefetchers[source].reading(lane, position)
        if first == 0:
            yield self._read(source, order, order.at(lane, position))
        for attempt in range(max(0, first - 1), SUBSTITUTES):
            location = order.substitute(lane, position, attempt)
            if location is None:
                return
            yield self._read(source, order, location)

    def _read(self, source: int, order: SourceOrder, location: Location) -> tuple[SampleId, dict[str, bytes]]:
        reader = self.readers[source]
        key, members = reader.read(location.shard, location.index)
        url = reader.manifest.url(location.shard)
        return SampleId(order.name, location.epoch, url, location.index, key), members


def start_worker(worker: int) -> None:
    """For torch's DataLoader: processes next to each other share the cores, so each gets one thread."""
    torch.set_num_threads(1)
