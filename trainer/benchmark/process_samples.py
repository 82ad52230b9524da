"""Measure the processes of a run from outside: memory, threads and file descriptors of ranks and loader processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_RANK = re.compile(r"--local_rank=\d+")


@dataclass(frozen=True)
class ProcessSample:
    """Hold one measurement, summed over processes of one kind.

    Attributes:
        processes: Number of processes.
        memory: Proportional set size in bytes, with what was swapped out. Memory that n processes share counts as
            1/n in each, so the sum counts it once.
        threads: Number of threads.
        descriptors: Number of open file descriptors.
    """

    processes: int
    memory: int
    threads: int
    descriptors: int


def sample_ranks_and_workers(launcher: int) -> tuple[ProcessSample, ProcessSample]:
    """Measure all ranks and all loader processes below the process ``launcher``.

    Raises:
        psutil.NoSuchProcess: A process ended in between.
    """
    ranks = list(_ranks(psutil.Process(launcher)))
    workers = [worker for rank in ranks for worker in rank.children(recursive=True)]
    return _sample(ranks), _sample(workers)


def _ranks(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yield the topmost processes with a local rank; a loader process is a fork and has its rank's command line."""
    for child in process.children():
        if any(_RANK.fullmatch(word) for word in child.cmdline()):
            yield child
        else:
            yield from _ranks(child)


def _sample(processes: list[psutil.Process]) -> ProcessSample:
    return ProcessSample(
        processes=len(processes),
        memory=sum(_memory(process.pid) for process in processes),
        threads=sum(process.num_threads() for process in processes),
        descriptors=sum(process.num_fds() for process in processes),
    )


def _memory(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(process) from error
    kibibytes = dict(re.findall(r"^(\w+): +(\d+) kB$", text, flags=re.MULTILINE))
    return 1024 * (int(kibibytes["Pss"]) + int(kibibytes["SwapPss"]))
