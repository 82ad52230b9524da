"""Plan how a step divides each source among lanes, ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.batch_sizes import batch_size_problems, divide_batch
from trainer.config.data_config import DataConfig, MediaSource, Source
from trainer.data.shards.manifest import Manifest
from trainer.data.stream.order import SourceOrder
from trainer.data.stream.shared_arrays import SharedArrays


@dataclass(frozen=True)
class SourcePlan:
    """Describe one source in one step on one rank.

    Attributes:
        source: Settings of the source.
        num_lanes: Lanes over all ranks.
        rows_per_lane: Rows that a lane gives to a step.
        micro_batch_size: Rows of a micro-batch.
        num_micro_batches: Micro-batches of this rank.
    """

    source: Source
    num_lanes: int
    rows_per_lane: int
    micro_batch_size: int
    num_micro_batches: int

    @property
    def samples_per_row(self) -> int:
        """Samples that make up a row; a packed row takes as many as fit instead."""
        return self.source.samples_in_row

    @property
    def num_frames(self) -> int:
        """Frames of a medium."""
        return self.source.frames_in_medium

    @property
    def keeps_aspect(self) -> bool:
        """Whether media have shapes of their own."""
        return isinstance(self.source, MediaSource) and self.source.image_tokens is not None

    @property
    def samples_per_step(self) -> int:
        """Samples of a step over all ranks, where rows are not packed."""
        return self.num_lanes * self.rows_per_lane * self.samples_per_row

    @property
    def most_samples_per_step(self) -> int:
        """Upper bound of the samples of a step over all ranks; a packed row holds at most one for each token."""
        return self.samples_per_step * (self.source.max_tokens if self.source.packing else 1)


def plan_step(config: DataConfig, world_size: int) -> tuple[SourcePlan, ...]:
    """Plan a step of every source.

    Raises:
        ValueError: Batches cannot be divided among that many ranks; the message names every setting.
    """
    problems = batch_size_problems(config, world_size)
    if problems:
        raise ValueError("\n".join(f"{problem.path}: {problem.message}" for problem in problems))
    plans = []
    for source in config.sources:
        share = divide_batch(config, source, world_size)
        plans.append(
            SourcePlan(source, share.num_lanes, share.rows_per_lane, share.micro_batch_size, share.num_micro_batches)
        )
    return tuple(plans)


def build_orders(
    config: DataConfig, plans: Sequence[SourcePlan], manifests: Sequence[Manifest]
) -> tuple[SourceOrder, ...]:
    """Build the order of each source.

    Raises:
        ValueError: Sources have fewer samples than lanes; the message names all of them.
    """
    orders, problems = [], []
    for plan, manifest in zip(plans, manifests, strict=True):
        try:
            orders.append(
                SourceOrder(
                    plan.source.name,
                    manifest.samples,
                    seed=config.seed,
                    num_lanes=plan.num_lanes,
                    samples_per_step=plan.samples_per_step,
                    read_block=config.read_block,
                    shuffle_window=config.shuffle_window,
                    shared=SharedArrays(config.cache_dir),
                )
            )
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(orders)
