"""Deliver the steps of a run to the training loop, each as a list of micro-batches in the order of the sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from trainer.config.data_config import DataConfig
from trainer.data.batch import Batch, BatchFormat
from trainer.data.errors import DataError
from trainer.data.samples.rows import RowBuilder
from trainer.data.shards.manifest import load_manifest
from trainer.data.stream.loader_processes import (
    SharedMicroBatches,
    check_hand_over,
    explain_failures,
    micro_batches_ahead,
)
from trainer.data.stream.micro_batches import MicroBatch, MicroBatches, start_worker
from trainer.data.stream.packing import LanePosition, LanePositions
from trainer.data.stream.replacement_log import ReplacementLog
from trainer.data.stream.stream_state import data_state
from trainer.data.stream.turns import SourceTurns, StepIndices


@dataclass(frozen=True)
class StepBatches:
    """Hold the micro-batches of one step on this rank; ``step`` counts from 0."""

    step: int
    micro_batches: list[Batch]


class StepLoader:
    """Iterate over the steps from ``start_step`` up to ``stop_step`` (exclusive); each iteration starts anew.

    Loader processes (``data.num_workers``) change who makes a micro-batch, never its content or its place. A sample
    that cannot be used is replaced and counted; the first one of each reason is logged.

    Args:
        config: Settings of the data.
        builders: Row builder of each source, by name.
        batch_format: What the model takes.
        rank: Rank that loads.
        world_size: Number of ranks.
        start_step: First step.
        stop_step: Step after the last one.
        pin_memory: Whether batches are put into pinned host memory.
        lane_positions: Positions of packed lanes before ``start_step``, over all ranks, by source.
        in_turn: Whether a step has one source, in turn; else it has all.

    Attributes:
        manifests: Manifest of each source, in the order of ``data.sources``.
        lane_positions: Positions of this rank's packed lanes after the step that was delivered last. Steps that are
            only prefetched do not move them.

    Raises:
        ValueError: Settings do not fit.
        ShardError: Shards are missing, have changed or are damaged.
        TooManyBadSamplesError: More samples are bad than ``data.max_bad_fraction`` allows, or all samples are.
        NoSamplesLeftError: The filters of a source leave nothing.
    """

    def __init__(
        self,
        config: DataConfig,
        builders: Mapping[str, RowBuilder],
        batch_format: BatchFormat,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        pin_memory: bool = False,
        lane_positions: Mapping[str, LanePositions] | None = None,
        in_turn: bool = False,
    ) -> None:
        self.config, self.start_step, self.stop_step = config, start_step, stop_step
        self._turns = SourceTurns(len(config.sources), in_turn)
        missing = [source.name for source in config.sources if source.name not in builders]
        if missing:
            raise ValueError(f"no builder for the sources {', '.join(missing)}")
        self.manifests = tuple(load_manifest(source.manifest) for source in config.sources)
        self._dataset = MicroBatches(
            config,
            builders,
            self.manifests,
            batch_format,
            rank=rank,
            world_size=world_size,
            first_visits=self._turns.visits(start_step),
            lane_positions=lane_positions,
        )
        self.lane_positions: dict[str, dict[int, LanePosition]] = {
            source.name: {} for source in config.sources if source.packing
        }
        self._pin_memory = pin_memory
        self._log = ReplacementLog(is_main=rank == 0)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all sources in a step that has all, the same for every rank."""
        return self._dataset.micro_batches_per_step

    def __len__(self) -> int:
        """Return the number of steps."""
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[StepBatches]:
        self._dataset.prepare(self._turns.visits(self.start_step))
        indices = StepIndices(self._turns, self._dataset.slots, range(self.start_step, self.stop_step))
        stream = self._start(indices)
        try:
            for step in range(self.start_step, self.stop_step):
                made = [self._checked(self._next(stream)) for _ in indices.of_step(step)]
                for micro_batch in made:
                    if micro_batch.lane_positions:
                        self.lane_positions[micro_batch.batch.source].update(micro_batch.lane_positions)
                yield StepBatches(step, [micro_batch.batch for micro_batch in made])
        finally:
            # Ends the workers now: left to the garbage collector, each waits out torch's timeout of 5 s.
            del stream

    def state(self, step: int, lane_positions: Mapping[str, LanePositions] | None = None) -> dict[str, Any]:
        """Return ``data_state`` after ``step`` steps.

        Args:
            step: Number of steps done.
            lane_positions: Positions of all packed lanes, over all ranks, by source.
        """
        return data_state(self.config, self.manifests, step, lane_positions, self._turns.visits(step))

    def _checked(self, made: MicroBatch | DataError) -> MicroBatch:
        if isinstance(made, DataError):
            raise made
        self._log.record(made)
        return made

    def _start(self, indices: StepIndices) -> Iterator[MicroBatch | DataError]:
        """Start the loader processes, if there are any."""
        workers = self.config.num_workers
        if not workers:
            return iter(self._data_loader(self._dataset, indices, None))
        check_hand_over(workers)
        # data.prefetch counts steps ahead, over all workers; with fewer than two tasks each, a worker would idle.
        ahead = max(2, -(-self.config.prefetch * self.micro_batches_per_step // workers))
        ahead = micro_batches_ahead(ahead, workers)
        loader = self._data_loader(SharedMicroBatches(self._dataset), indices, ahead)
        return explain_failures(lambda: iter(loader), workers)

    def _next(self, stream: Iterator[MicroBatch | DataError]) -> MicroBatch | DataError:
        if not self.config.num_workers:
            return next(stream)
        return explain_failures(lambda: next(stream), self.config.num_workers)

    def _data_loader(
        self, dataset: Dataset[MicroBatch | DataError], indices: StepIndices, ahead: int | None
    ) -> DataLoader[MicroBatch | DataError]:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=indices,
            num_workers=self.config.num_workers,
            prefetch_factor=ahead,
            pin_memory=self._pin_memory,
            worker_init_fn=start_worker,
        )
