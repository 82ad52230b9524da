"""How an update is cut: lanes, ranks and micro-batches of each source, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.data_config import DataConfig, Source
from trainer.data.shards.manifest import Manifest
from trainer.data.stream.order import SourceOrder, allowed_world_sizes
from trainer.data.stream.shared_arrays import SharedArrays


@dataclass(frozen=True)
class SourcePlan:
    """One source in one update on one rank.

    lanes: V, over all ranks. rows_per_lane: sequences that a lane gives an update. samples_per_row: samples in a
    sequence; packing takes as many as fit instead. frames: of a medium. micro_batches of micro_batch_size rows each.
    """

    source: Source
    lanes: int
    rows_per_lane: int
    samples_per_row: int
    frames: int
    micro_batch_size: int
    micro_batches: int

    @property
    def keeps_aspect(self) -> bool:
        """Whether media have shapes of their own."""
        return getattr(self.source, "image_tokens", None) is not None

    @property
    def samples_per_step(self) -> int:
        """Over all ranks."""
        return self.lanes * self.rows_per_lane * self.samples_per_row


def plan_step(config: DataConfig, world_size: int) -> tuple[SourcePlan, ...]:
    """Raises one ValueError with everything that does not fit and the values that would."""
    plans, problems = [], []
    names = [source.name for source in config.sources]
    if not names:
        problems.append("data.sources is empty")
    problems += [
        f"data.sources: the name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for number, source in enumerate(config.sources):
        path = f"data.sources.{number} ({source.name})"
        lanes = config.num_lanes or source.batch_size
        rows, micro = source.batch_size // world_size, source.micro_batch_size
        if source.batch_size % lanes:
            problems.append(
                f"{path}: batch_size = {source.batch_size} is not a multiple of data.num_lanes = {lanes}; "
                f"possible lanes: {_listed(allowed_world_sizes(source.batch_size))}"
            )
        elif lanes % world_size:
            problems.append(
                f"{path}: world size {world_size} does not divide its {lanes} lanes (data.num_lanes, or batch_size where "
                f"that is not set); possible world sizes: {_listed(allowed_world_sizes(lanes))}"
            )
        elif micro is not None and rows % micro:
            problems.append(
                f"{path}: micro_batch_size = {micro} does not divide batch_size / world size = "
                f"{source.batch_size} / {world_size} = {rows}; possible: {_listed(allowed_world_sizes(rows))}"
            )
        else:
            micro = micro or rows
            samples_per_row = getattr(source, "samples_per_row", 1)
            frames = getattr(source, "frames", 1)
            each = source.batch_size // lanes
            plans.append(SourcePlan(source, lanes, each, samples_per_row, frames, micro, rows // micro))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(plans)


def build_orders(
    config: DataConfig, plans: Sequence[SourcePlan], manifests: Sequence[Manifest]
) -> tuple[SourceOrder, ...]:
    """The order of each source. Raises one ValueError for all sources that are too small."""
    orders, problems = [], []
    for plan, manifest in zip(plans, manifests, strict=True):
        try:
            orders.append(
                SourceOrder(
                    plan.source.name,
                    manifest.samples,
                    seed=config.seed,
                    num_lanes=plan.lanes,
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


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 40 else f"the divisors of {values[-1]}"
