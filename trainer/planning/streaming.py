"""Find how large a micro-batch has to be so that the weights stream from the host or a drive behind the computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainer.config.batch_sizes import batch_size_problems, divide_batch
from trainer.config.data_config import Source
from trainer.config.run_config import RunConfig
from trainer.planning.prediction import Cluster, Prediction


@dataclass(frozen=True)
class Hidden:
    """Describe the smallest micro-batch of a source that hides the streaming.

    Attributes:
        source: Name of the source.
        stream_seconds: Seconds in which the parameters come from the host or the drives for one micro-batch.
        rows_now: Rows of the micro-batch as configured.
        rows: Fewest rows whose computation takes as long.
        tokens: Tokens of these rows.
        fits: Whether the source's batch has that many rows for each process.
    """

    source: str
    stream_seconds: float
    rows_now: int
    rows: int
    tokens: int
    fits: bool


def smallest_hidden_micro_batches(
    config: RunConfig, cluster: Cluster, predict: Callable[[RunConfig, Cluster], Prediction]
) -> Iterator[Hidden]:
    """Yield an answer for each source; nothing where the parameters stay on the device.

    Parameters stream as often for a micro-batch of one row as for a larger one, and its computation grows with its
    rows. So the quotient of the two for the micro-batch as it is gives the rows. Turning codes into numbers takes as
    long for any micro-batch, and hides its own share.

    Args:
        config: The run.
        cluster: Its devices.
        predict: Prediction of a configuration with fewer sources, on a cluster.
    """
    if config.deepspeed.offload_param.device == "none":
        return
    for source in config.data.sources:
        alone = _with_only(config, source)
        share = divide_batch(config.data, source, cluster.size)
        seconds = predict(alone, cluster).seconds
        from_host = seconds["host link"] - _without_parameters(alone, cluster, predict)
        stream = max(from_host, seconds.get("drive", 0.0)) / share.num_micro_batches
        compute = seconds["compute"] / share.num_micro_batches / share.micro_batch_size
        codes = seconds.get("dequantize", 0.0) / share.num_micro_batches
        rows = max(1, math.ceil((stream - codes) / compute))
        yield Hidden(
            source.name,
            stream,
            share.micro_batch_size,
            rows,
            rows * source.max_tokens,
            rows <= source.batch_size // cluster.size,
        )


def _with_only(config: RunConfig, source: Source) -> RunConfig:
    data = replace(config.data, sources=(source,))
    assert not batch_size_problems(data)
    return replace(config, data=data)


def _without_parameters(
    config: RunConfig, cluster: Cluster, predict: Callable[[RunConfig, Cluster], Prediction]
) -> float:
    """Return the seconds on the host link that are not of the parameters: those of gradients and optimizer."""
    offload = replace(config.deepspeed.offload_param, device="none", path=None)
    resident = replace(config, deepspeed=replace(config.deepspeed, frozen=None, offload_param=offload))
    return predict(resident, cluster).seconds["host link"]


def print_streaming(found: Hidden) -> None:
    """Print the smallest micro-batch that hides the streaming, and whether the configured one does."""
    verdict = "hides it" if found.rows_now >= found.rows else "does NOT hide it"
    batch = "" if found.fits else "; the source's batch has fewer rows for each process"
    print(
        f"  stream   {found.source:28s} {found.stream_seconds:10.3f} s a micro-batch, hidden by {found.rows} rows or "
        f"more ({found.tokens} tokens){batch}; the micro-batch of {found.rows_now} rows {verdict}",
        flush=True,
    )
