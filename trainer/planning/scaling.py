"""Predict how a run scales: the same step on more devices, and a step that grows with the devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trainer.config.batch_sizes import batch_size_problems
from trainer.config.data_config import Source
from trainer.config.run_config import RunConfig
from trainer.planning.prediction import Cluster, Prediction

Run = TypeVar("Run", bound=RunConfig)


@dataclass(frozen=True)
class ScalingPoint:
    """Hold the predictions for one number of devices.

    Attributes:
        cluster: The devices.
        strong: Prediction of the same global batch; None where it cannot be divided among the devices.
        weak: Prediction of a global batch in proportion to the devices.
    """

    cluster: Cluster
    strong: Prediction | None
    weak: Prediction | None


def scaling(
    config: Run,
    cluster: Cluster,
    sizes: Sequence[int],
    predict: Callable[[Run, Cluster], Prediction],
) -> Iterator[ScalingPoint]:
    """Yield a point for each number of devices.

    Args:
        config: Run whose batch is that of ``cluster``.
        cluster: Devices of the run. Fewer than ``devices_per_node`` stay in one node.
        sizes: Numbers of devices.
        predict: Prediction of a configuration on a cluster.
    """
    batches = [source.batch_size for source in config.data.sources]
    for size in sizes:
        per_node = min(size, cluster.devices_per_node)
        at = replace(cluster, nodes=-(-size // per_node), devices_per_node=per_node)
        same = _with_batches(config, batches, at.size)
        grown = _with_batches(config, [batch * at.size // cluster.size for batch in batches], at.size)
        strong, weak = (None if run is None else predict(run, at) for run in (same, grown))
        yield ScalingPoint(at, strong, weak)


def _micro_batch_size(source: Source, rows: int) -> int | None:
    """Return the rows of a micro-batch where a rank has that many; None leaves them to ``micro_batch_tokens``."""
    return None if source.micro_batch_tokens is not None else min(source.micro_batch_size or rows, rows)


def _with_batches(config: Run, batch_sizes: Sequence[int], size: int) -> Run | None:
    """Return the run with other batches and micro-batches that a rank can fill, or None where they do not divide."""
    if any(batch < size for batch in batch_sizes):
        return None
    sources = tuple(
        replace(source, batch_size=batch, micro_batch_size=_micro_batch_size(source, batch // size))
        for source, batch in zip(config.data.sources, batch_sizes, strict=True)
    )
    data = replace(config.data, sources=sources, num_lanes=None)
    deepspeed = replace(config.deepspeed, hpz_partition_size=math.gcd(config.deepspeed.hpz_partition_size, size))
    return None if batch_size_problems(data, size) else replace(config, data=data, deepspeed=deepspeed)
