"""``python -m trainer.benchmark stream``: measure a model whose weights lie on a drive.

Every case is a process of its own: ``trainer.benchmark step configs/benchmark/streamed.yaml``, which has one
cross-attention and as many blocks of the language model as the case says, in bfloat16.

Memory: the peak of a step with 8 blocks and with more, with the weights on a drive, and with the most blocks on the
host. That of a device is the memory of all tensors; on a CPU the buffers of the drive are among them. That of a process
is its resident set, which has libraries and the modules' own objects, too. A step has two rows, because the input of
each block is kept for the backward.

Time: a step with the weights on a drive, against the longer of two: the same step with the weights on the host, and the
reads alone. Both steps are measured in turn, and the median of several pairs counts. The reads are what the step read
from the drive (``/proc/self/io``), at the speed of DeepSpeed's op when it reads a file of the same drive and nothing
else runs. Files are read past the page cache.

``TMPDIR`` names the drive. DeepSpeed's op needs libaio; see docs/large_models.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from trainer.benchmark.result_file import Measurement, read_result
from trainer.benchmark.sass import ToolMissingError
from trainer.config.checks.missing_libraries import nvme_obstacle

BENCHMARK = "stream"
FEWEST_BLOCKS = 8
BLOCKS = (16, 32, 64)
TIMED_BLOCKS = 16
MOST_GROWTH, MOST_SECONDS = 1.02, 1.1  # of the memory, and of the longer of computation and reads
ROWS, TIMED_ROWS = 2, 16
STEPS, READS, PAIRS = 5, 8, 3
_ROOT = Path(__file__).parents[2]
_READ_BYTES = 2**28
_MIB = 2.0**20
Rows = dict[str, float]  # values of trainer.benchmark step, by measure


class StepMeasured(Protocol):
    """Measure a step of some rows, of a model with so many blocks whose weights lie on a drive or on the host."""

    def __call__(self, blocks: int, rows: int, *, on_drive: bool) -> Rows:
        """Return the measured values by their names."""
        ...


def run(device: str) -> Iterator[Measurement]:
    """Yield the measurements.

    Raises:
        ToolMissingError: DeepSpeed's op for drives cannot be compiled here.
    """
    obstacle = nvme_obstacle()
    if obstacle is not None:
        raise ToolMissingError(obstacle)
    with TemporaryDirectory(prefix="stream-") as folder:
        yield from compare(partial(_measure_step, Path(folder), device), _read_speed(Path(folder)))


def compare(measured: StepMeasured, bytes_per_second: float) -> Iterator[Measurement]:
    """Yield the measurements.

    Args:
        measured: Returns what ``trainer.benchmark step`` measures, for a number of blocks.
        bytes_per_second: Speed of the drive.
    """
    on_drive = {blocks: measured(blocks, ROWS, on_drive=True) for blocks in (FEWEST_BLOCKS, *BLOCKS)}
    yield from _memory(on_drive, measured(BLOCKS[-1], ROWS, on_drive=False))
    timed: dict[bool, list[Rows]] = {True: [], False: []}
    for _ in range(PAIRS):
        for place, found in timed.items():
            found.append(measured(TIMED_BLOCKS, TIMED_ROWS, on_drive=place))
    yield from _seconds(_medians(timed[True]), _medians(timed[False]), bytes_per_second)


def _medians(measured: Sequence[Rows]) -> Rows:
    return {name: statistics.median(rows[name] for rows in measured) for name in measured[0]}


def _memory(on_drive: dict[int, Rows], on_host: Rows) -> Iterator[Measurement]:
    baseline, host = f"{FEWEST_BLOCKS} blocks on a drive", f"{BLOCKS[-1]} blocks on the host"
    for measure, target in (("peak memory of a device", 1 / MOST_GROWTH), ("peak memory of a process", None)):
        fewest = on_drive[FEWEST_BLOCKS][measure]
        for blocks in BLOCKS:
            case, peak = f"{blocks} blocks on a drive", on_drive[blocks][measure]
            yield Measurement.compared(BENCHMARK, case, measure, "MiB", peak, baseline, fewest, target)
        yield Measurement.compared(BENCHMARK, host, measure, "MiB", on_host[measure], baseline, fewest)
    for blocks in BLOCKS:
        weights = 2 * on_drive[blocks]["parameters"] / _MIB
        yield Measurement(BENCHMARK, f"{blocks} blocks on a drive", "weights", "MiB", weights)


def _seconds(on_drive: Rows, on_host: Rows, bytes_per_second: float) -> Iterator[Measurement]:
    case = f"{TIMED_BLOCKS} blocks on a drive"
    step, computation = (rows["step, median"] for rows in (on_drive, on_host))
    reads = on_drive["read from drives"] * _MIB / bytes_per_second
    yield Measurement(BENCHMARK, case, "read from drives", "MiB", on_drive["read from drives"])
    yield Measurement(BENCHMARK, case, "speed of the drive", "MiB/s", bytes_per_second / _MIB)
    longer = "its computation" if computation > reads else "its reads"
    for name, seconds in (("its computation", computation), ("its reads", reads)):
        target = 1 / MOST_SECONDS if name == longer else None
        yield Measurement.compared(BENCHMARK, case, "step", "s", step, name, seconds, target)


def _measure_step(folder: Path, device: str, blocks: int, rows: int, *, on_drive: bool) -> Rows:
    """Return what ``trainer.benchmark step`` measures, by name.

    Raises:
        RuntimeError: It failed.
    """
    result, swapped = folder / "result.json", folder / "swapped"
    swapped.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "trainer.benchmark", "step", str(_ROOT / "configs/benchmark/streamed.yaml")]
    command += ["--steps", str(STEPS), "--warmup", "1", "--json", str(result)]
    command += ["--model.language_model.architecture.num_hidden_layers", str(blocks)]
    command += ["--data.sources.0.batch_size", str(rows)]
    if on_drive:
        command += ["--deepspeed.offload_param.device", "nvme", "--deepspeed.offload_param.path", str(swapped)]
    environment = os.environ | {"DS_ACCELERATOR": device}
    ended = subprocess.run(command, check=False, cwd=_ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    return {row["measure"]: row["value"] for row in read_result(result)[1]}


def _read_speed(folder: Path) -> float:
    """Return the bytes per second of DeepSpeed's op: the median of several reads of one file."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

    settings = get_aio_config({})
    names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    handle = AsyncIOBuilder().load().aio_handle(**{name: settings[name] for name in names})
    buffer = handle.new_cpu_locked_tensor(_READ_BYTES, torch.empty(0, dtype=torch.uint8))
    path = str(folder / "file")
    handle.sync_pwrite(buffer, path)
    seconds = []
    for _ in range(READS):
        start = time.perf_counter()
        handle.sync_pread(buffer, path)
        seconds.append(time.perf_counter() - start)
    return _READ_BYTES / statistics.median(seconds)
