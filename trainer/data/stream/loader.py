"""The stream as the training loop sees it: updates, each a list of micro-batches in the order of the sources."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from trainer.config.data_config import DataConfig
from trainer.data.batch import Batch, RejectedSample
from trainer.data.errors import DataError
from trainer.data.samples.row_builder import Builder
from trainer.data.shards.manifest import load_manifest
from trainer.data.stream.micro_batches import MicroBatch, MicroBatches, start_worker
from trainer.data.stream.packing import LanePosition, LanePositions
from trainer.data.stream.step_plan import plan_step
from trainer.data.stream.stream_state import data_state

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one optimizer step consumes on this rank."""

    step: int
    micro_batches: list[Batch]


def micro_batches_per_step(config: DataConfig, world_size: int) -> int:
    """Of all sources together, on each rank. Raises ValueError when sizes do not fit."""
    return sum(plan.micro_batches for plan in plan_step(config, world_size))


class StepLoader:
    """Iterates over the updates from start_step up to stop_step (exclusive); each iteration starts anew.

    builders: by source name. media_shape: [frames, 3, height, width] of the dummy medium. patch_size: the tower's, for
    sources with ``image_tokens``. Loader processes (``data.num_workers``) only change who makes a micro-batch, never which
    or when it comes. A sample that cannot be used is replaced by its substitute, counted in ``Batch.rejected`` and
    logged at the first time of each reason.
    lane_positions: of packed sources before start_step, over all ranks (``data_state``). The attribute of that name has
    this rank's after the update that was given last: prefetching does not move it.
    Raises ValueError (settings), ShardError and TooManyBadSamplesError (data).
    """

    def __init__(
        self,
        config: DataConfig,
        builders: Mapping[str, Builder],
        *,
        pad_id: int,
        media_shape: tuple[int, int, int, int],
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        pin_memory: bool = False,
        lane_positions: Mapping[str, LanePositions] | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.config, self.start_step, self.stop_step = config, start_step, stop_step
        missing = [source.name for source in config.sources if source.name not in builders]
        if missing:
            raise ValueError(f"no builder for the sources {', '.join(missing)}")
        self.manifests = tuple(load_manifest(source.manifest) for source in config.sources)
        self._dataset = MicroBatches(
            config,
            builders,
            self.manifests,
            pad_id=pad_id,
            media_shape=media_shape,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
            lane_positions=lane_positions,
            patch_size=patch_size,
        )
        self.lane_positions: dict[str, dict[int, LanePosition]] = {
            source.name: {} for source in config.sources if source.packing
        }
        self._pin_memory = pin_memory
        self._logged: set[str] = set()

    @property
    def micro_batches_per_step(self) -> int:
        """The same for every rank and step."""
        return self._dataset.micro_batches_per_step

    def __len__(self) -> int:
        """Updates."""
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[Update]:
        each = self.micro_batches_per_step
        self._dataset.prepare(self.start_step)
        stream = iter(self._stream(range(self.start_step * each, self.stop_step * each)))
        try:
            for step in range(self.start_step, self.stop_step):
                update = Update(step, [self._checked(next(stream)) for _ in range(each)])
                for batch in update.micro_batches:
                    if batch.lane_positions:
                        self.lane_positions[batch.source].update(batch.lane_positions)
                yield update
        finally:
            # Ends the workers now: left to the garbage collector, each waits out torch's timeout of 5 s.
            del stream

    def state(self, step: int, lane_positions: Mapping[str, LanePositions] | None = None) -> dict[str, Any]:
        """``data_state`` after ``step`` updates; lane_positions: those of all ranks, where sources are packed."""
        return data_state(self.config, self.manifests, step, lane_positions)

    def _checked(self, made: MicroBatch | DataError) -> Batch:
        if isinstance(made, DataError):
            raise made
        self._log(made.rejected)
        return made.batch

    def _stream(self, indices: range) -> DataLoader[MicroBatch | DataError]:
        workers = self.config.num_workers
        # data.prefetch counts updates ahead, over all workers; with fewer than two tasks each, a worker would idle.
        ahead = max(2, -(-self.config.prefetch * self.micro_batches_per_step // max(1, workers)))
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            pin_memory=self._pin_memory,
            worker_init_fn=start_worker,
        )

    def _log(self, rejected: tuple[RejectedSample, ...]) -> None:
        for one in rejected:
            if one.reason not in self._logged:
                self._logged.add(one.reason)
                _LOG.warning(
                    "sample replaced (%s) source=%s shard=%s index=%d key=%a: %a; more of this reason are only counted",
                    one.reason,
                    one.sample.source,
                    one.sample.shard,
                    one.sample.index,
                    one.sample.key,
                    one.detail,
                )
