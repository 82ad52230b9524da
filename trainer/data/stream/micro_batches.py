"""Make any micro-batch of a rank, in any order and in any process, always alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from trainer.config.data_config import DataConfig
from trainer.data.batch import Batch, BatchFormat, RejectedSample, Row, SampleId, collate
from trainer.data.errors import DataError
from trainer.data.samples.rows import RowBuilder, join, sample_rng
from trainer.data.shards.manifest import Manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.storage_settings import StorageSettings, check_cache_size
from trainer.data.stream.order import Location, SourceOrder, lanes_of
from trainer.data.stream.packed_rows import PackedRows
from trainer.data.stream.packing import LanePosition, LanePositions
from trainer.data.stream.prefetch import BlockPrefetcher
from trainer.data.stream.replacement import Candidate, Rejections, ReplacementSearch
from trainer.data.stream.step_plan import build_orders, plan_step
from trainer.runtime.stop_signals import follow_parent

_NEAR_REPLACEMENTS = 16  # where half of all samples are bad, sixteen in a row happen once in 65,000


class MicroBatch(NamedTuple):
    """Hold a batch and where it leaves the stream.

    Attributes:
        batch: Input of the model.
        rejected: Samples that others replaced, the first one of each reason.
        dropped_images: Samples that lost an image, the first one of each reason.
        lane_positions: Position of each packed lane after this batch.
    """

    batch: Batch
    rejected: tuple[RejectedSample, ...]
    dropped_images: tuple[RejectedSample, ...]
    lane_positions: LanePositions


class MicroBatches(Dataset[MicroBatch | DataError]):
    """Map index ``visit * micro_batches_per_step + number`` to a micro-batch, or to the error that stops the stream.

    A step visits all sources, or one in turn: then a source has fewer visits than there are steps. The numbers run
    through the sources in their order, and through the micro-batches of each source. An error is returned and not
    raised: torch would wrap it into one whose message is a loader process's traceback.

    A process goes through the texts of packed lanes from ``first_visits`` on. Where ``data.num_workers`` divides the
    micro-batches of a step, each loader process meets the same lanes in every step, and no two read the same texts.

    Args:
        config: Settings of the data.
        builders: Row builder of each source, by name.
        manifests: Manifest of each source, in the order of ``data.sources``.
        batch_format: What the model takes.
        rank: Rank that the micro-batches are for.
        world_size: Number of ranks.
        first_visits: First visit of each source that will be asked for; None is the first of all.
        lane_positions: Positions of packed lanes before these visits, by source; none at the start of a run.

    Raises:
        ValueError: Sizes do not fit.
    """

    def __init__(
        self,
        config: DataConfig,
        builders: Mapping[str, RowBuilder],
        manifests: Sequence[Manifest],
        batch_format: BatchFormat,
        *,
        rank: int,
        world_size: int,
        first_visits: Sequence[int] | None = None,
        lane_positions: Mapping[str, LanePositions] | None = None,
    ) -> None:
        self.config, self.builders, self.batch_format = config, builders, batch_format
        self.plans = plan_step(config, world_size)
        self.orders = build_orders(config, self.plans, manifests)
        storage = StorageSettings.of(config)
        self.readers = tuple(ShardReader(manifest, storage=storage) for manifest in manifests)
        self._prefetchers = tuple(
            BlockPrefetcher(manifest, order, storage) for manifest, order in zip(manifests, self.orders, strict=True)
        )
        self._lanes = [lanes_of(rank, world_size, plan.num_lanes) for plan in self.plans]
        for plan, manifest, lanes in zip(self.plans, manifests, self._lanes, strict=True):
            check_cache_size(manifest, storage, len(lanes), config.shuffle_window, f"source {plan.source.name!r}")
        self._searches = [
            ReplacementSearch.of(config, plan.source.name, plan.most_samples_per_step) for plan in self.plans
        ]
        positions = lane_positions or {}
        first = first_visits or (0,) * len(self.plans)
        self._packed = {
            number: self._packed_rows(number, first[number], positions.get(plan.source.name, {}))
            for number, plan in enumerate(self.plans)
            if plan.source.packing
        }
        self._slots = [
            (number, micro) for number, plan in enumerate(self.plans) for micro in range(plan.num_micro_batches)
        ]

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all sources in a step, the same for every rank."""
        return len(self._slots)

    @property
    def slots(self) -> list[int]:
        """Source of each micro-batch of a step that visits all."""
        return [source for source, _ in self._slots]

    def prepare(self, visits: Sequence[int]) -> None:
        """Compute the orders of the next visits before loader processes are forked, which then share them."""
        for order, visit in zip(self.orders, visits, strict=True):
            order.prepare(visit)

    def __getitem__(self, index: int) -> MicroBatch | DataError:
        try:
            return self._micro_batch(index)
        except DataError as error:
            return error

    def _micro_batch(self, index: int) -> MicroBatch:
        visit, number = divmod(index, len(self._slots))
        source, micro = self._slots[number]
        plan = self.plans[source]
        rejected = Rejections()
        positions: dict[int, LanePosition] = {}
        rows = []
        for place in range(micro * plan.micro_batch_size, (micro + 1) * plan.micro_batch_size):
            lane = self._lanes[source][place // plan.rows_per_lane]
            row_of_lane = visit * plan.rows_per_lane + place % plan.rows_per_lane
            if source in self._packed:
                row, positions[lane] = self._packed[source].row(lane, row_of_lane, rejected)
            else:
                first = row_of_lane * plan.samples_per_row
                parts = [self._row(source, lane, first + offset, rejected) for offset in range(plan.samples_per_row)]
                row = join(parts, plan.source.max_tokens)
            rows.append(row)
        batch = collate(
            rows,
            self.batch_format,
            source=plan.source.name,
            num_frames=plan.num_frames,
            keeps_aspect=plan.keeps_aspect,
            rejected=rejected.counts,
        )
        dropped = {image.reason: image for row in reversed(rows) for image in reversed(row.dropped_images)}
        return MicroBatch(batch, tuple(rejected.examples.values()), tuple(dropped.values()), positions)

    def _packed_rows(self, source: int, first_visit: int, positions: LanePositions) -> PackedRows:
        plan = self.plans[source]
        return PackedRows(
            self.builders[plan.source.name],
            partial(self._candidates, source),
            self._searches[source],
            seed=self.config.seed,
            max_tokens=plan.source.max_tokens,
            first_row=first_visit * plan.rows_per_lane,
            positions=positions,
        )

    def _row(self, source: int, lane: int, position: int, rejected: Rejections) -> Row:
        """Build the row of one sample, or of the first replacement that can be used."""
        build = self.builders[self.plans[source].source.name]

        def use(candidate: Candidate) -> Row:
            return build(candidate.members, candidate.sample, sample_rng(self.config.seed, candidate.sample))

        return self._searches[source].first_usable(self._candidates(source, lane, position), use, rejected)[1]

    def _candidates(self, source: int, lane: int, position: int, first_attempt: int = 0) -> Iterator[Candidate]:
        """Yield the sample at a position (attempt 0), then its replacements, from ``first_attempt`` on."""
        order = self.orders[source]
        self._prefetchers[source].reading(lane, position)
        near = min(_NEAR_REPLACEMENTS, order.window_length(position) - 1)
        for attempt in count(first_attempt):
            location = order.substitute(lane, position, attempt - 1) if attempt else order.at(lane, position)
            if location is None:
                return
            yield Candidate(attempt, attempt <= near, *self._read(source, order, location))

    def _read(self, source: int, order: SourceOrder, location: Location) -> tuple[SampleId, dict[str, bytes]]:
        reader = self.readers[source]
        key, members = reader.read(location.shard, location.index)
        key = key.encode("utf-8", "backslashreplace").decode()  # a name that is not UTF-8 holds surrogates
        url = reader.manifest.url(location.shard)
        return SampleId(order.name, location.epoch, url, location.index, key), members


def start_worker(worker: int) -> None:
    """Set up a loader process; torch's DataLoader calls this.

    It has one thread, since the processes share the cores. It ends when its rank ends, and takes no signal that asks
    the rank to save: those also reach loader processes when they are sent to the whole process group.
    """
    torch.set_num_threads(1)
    follow_parent()
