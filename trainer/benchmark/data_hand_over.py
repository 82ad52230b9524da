"""Measure the hand-over of batches from a loader process to the training process."""

from __future__ import annotations

import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from trainer.benchmark.data_reading import BENCHMARK, IMAGE_SIZE, write_shards
from trainer.benchmark.result_file import Measurement
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.batch import BatchFormat, Row, SampleId
from trainer.data.samples.rows import make_row
from trainer.data.stream.loader import StepLoader

_BATCH_SIZE = 32


def hand_over_rows(repeats: int) -> Iterator[Measurement]:
    """Yield the processor time, over all processes, that handing over one sample takes."""
    with tempfile.TemporaryDirectory() as name:
        _, output = write_shards(Path(name), 2, 500)
        data = DataConfig((ImageTextSource("pairs", output, _BATCH_SIZE),))

        def stream(num_workers: int, steps: int) -> None:
            config = replace(data, num_workers=num_workers)
            loader = StepLoader(
                config,
                {"pairs": _ConstantRow()},
                BatchFormat(pad_id=0, image_size=IMAGE_SIZE),
                rank=0,
                world_size=1,
                start_step=0,
                stop_step=steps,
            )
            for step in loader:
                step.micro_batches[0].media.flatten()[::4096].sum()

        floats = torch.zeros(_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)

        def float_stream(num_workers: int, steps: int) -> None:
            for received in DataLoader(_SameBatch(floats, steps), batch_size=None, num_workers=num_workers):
                received.flatten()[::4096].sum()

        uint8 = statistics.median(_extra_cost(stream) for _ in range(repeats))
        float32 = statistics.median(_extra_cost(float_stream) for _ in range(repeats))
    case, measure = "uint8 224 x 224 and tokens", "hand-over to the training process"
    yield Measurement.compared(BENCHMARK, case, measure, "ms", uint8, "limit", 0.45, target=1.0)
    yield Measurement.compared(BENCHMARK, case, measure, "ms", uint8, "float32 batches, torch's loader", float32)


class _ConstantRow:
    """Build the same row from every sample, so that only the way between processes costs time."""

    def __init__(self) -> None:
        self._image = torch.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        return make_row([1, 4, *range(10, 30), 5], [False] * 23, (self._image,), sample, image_id=4)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Return the length of the row."""
        return 23


class _SameBatch(torch.utils.data.Dataset[torch.Tensor]):
    """Repeat a batch."""

    def __init__(self, batch: torch.Tensor, number: int) -> None:
        self._batch, self._number = batch, number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self._number:
            raise IndexError(index)
        return self._batch.clone()


def _extra_cost(stream: Callable[[int, int], None]) -> float:
    """Return the milliseconds per sample, over all processes, that a loader process adds, without its start.

    Args:
        stream: Runs through a stream, given the number of loader processes and of steps.
    """

    def cost(num_workers: int, steps: int) -> float:
        before = _cpu_seconds()
        stream(num_workers, steps)
        return _cpu_seconds() - before

    short, long = 5, 65
    with_process, without = (cost(workers, long) - cost(workers, short) for workers in (1, 0))
    return 1e3 * (with_process - without) / ((long - short) * _BATCH_SIZE)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
