"""Divide the batches of a run among lanes, processes and micro-batches: the rules, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.data_config import DataConfig, Source
from trainer.config.run_config import RunConfig
from trainer.errors import Problem


@dataclass(frozen=True)
class BatchShare:
    """Describe how one source's batch of a step is divided.

    Attributes:
        num_lanes: Lanes of the source, over all processes.
        rows_per_lane: Rows that a lane gives to a step.
        micro_batch_size: Rows of a micro-batch.
        num_micro_batches: Micro-batches of a process in a step.
    """

    num_lanes: int
    rows_per_lane: int
    micro_batch_size: int
    num_micro_batches: int


def divide_batch(data: DataConfig, source: Source, world_size: int) -> BatchShare:
    """Divide a source's batch, for which ``batch_size_problems`` found nothing."""
    num_lanes = _num_lanes(data, source)
    rows_per_rank = source.batch_size // world_size
    micro_batch_size = source.micro_batch_size or rows_per_rank
    if source.micro_batch_tokens is not None:
        most = min(rows_per_rank, source.micro_batch_tokens // source.max_tokens)
        micro_batch_size = next(rows for rows in range(most, 0, -1) if rows_per_rank % rows == 0)
    return BatchShare(num_lanes, source.batch_size // num_lanes, micro_batch_size, rows_per_rank // micro_batch_size)


def batch_size_problems(data: DataConfig, world_size: int = 1) -> list[Problem]:
    """Return a problem for each source whose batch cannot be divided among that many processes.

    For one process, these are the problems that no number of processes mends.
    """
    return [problem for index in range(len(data.sources)) for problem in _source_problems(data, index, world_size)]


def world_size_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Return a problem for each setting that does not fit the number of processes; each names the numbers that fit."""
    misfits = _misfits(config, world_size)
    if not misfits:
        return []
    possible = ", ".join(map(str, possible_world_sizes(config))) or "none: the batch sizes have no divisor in common"
    return [
        Problem(problem.path, f"{problem.message}; possible numbers of processes for this configuration: {possible}")
        for problem in misfits
    ]


def possible_world_sizes(config: RunConfig) -> list[int]:
    """Return the numbers of processes that divide every batch and hpZ's groups."""
    largest = min(source.batch_size for source in config.data.sources)
    return [size for size in range(1, largest + 1) if not _misfits(config, size)]


def _num_lanes(data: DataConfig, source: Source) -> int:
    return data.num_lanes or source.batch_size


def _source_problems(data: DataConfig, index: int, world_size: int) -> Iterator[Problem]:
    source = data.sources[index]
    path, num_lanes, batch_size = f"data.sources.{index}", _num_lanes(data, source), source.batch_size
    rows, micro_batch_size, tokens = batch_size // world_size, source.micro_batch_size, source.micro_batch_tokens
    if tokens is not None and tokens < source.max_tokens:
        message = f"{tokens} are fewer than max_tokens {source.max_tokens}, those of one row"
        yield Problem(f"{path}.micro_batch_tokens", message, related=(f"{path}.max_tokens",))
    if tokens is not None and micro_batch_size is not None:
        message = f"{tokens} says the same as micro_batch_size {micro_batch_size}; leave one of them out"
        yield Problem(f"{path}.micro_batch_tokens", message, related=(f"{path}.micro_batch_size",))
    if batch_size % num_lanes:
        message = f"{batch_size} is not a multiple of data.num_lanes {num_lanes}: each lane gives equally many rows"
        yield Problem(f"{path}.batch_size", message, related=("data.num_lanes",))
    elif num_lanes % world_size:
        divided = "data.num_lanes" if data.num_lanes else "batch_size"
        message = f"{divided} {num_lanes} of {source.name} is not a multiple of {world_size} processes"
        yield Problem(f"{path}.batch_size", message)
    elif micro_batch_size is not None and rows % micro_batch_size:
        divided = f"batch_size {batch_size}" if world_size == 1 else f"{rows} rows of each of {world_size} processes"
        message = f"{micro_batch_size} does not divide {divided}; write a divisor of {rows}, or leave it out"
        yield Problem(f"{path}.micro_batch_size", message, related=(f"{path}.batch_size",))


def _misfits(config: RunConfig, world_size: int) -> list[Problem]:
    problems = batch_size_problems(config.data, world_size)
    group = config.deepspeed.hpz_partition_size
    if world_size % group:
        message = f"{world_size} processes are not whole groups of {group}, each with a copy of the parameters"
        problems.append(Problem("deepspeed.hpz_partition_size", message))
    return problems
