"""Time the steps of an engine: warm-up, timed steps, profiled steps with their parts, and on a GPU a traced one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from trainer.benchmark.device_trace import DeviceTrace, read_device_trace
from trainer.benchmark.part_clock import CONTRASTIVE_PARTS, DATA_WAIT, PARTS, PartClock, device_clock
from trainer.benchmark.step_memory import tensor_memory
from trainer.benchmark.timed_parts import parts_timed
from trainer.data.batch import Batch
from trainer.deepspeed_engine.engine import Engine
from trainer.metrics.utilization import device_memory

Accumulate = Callable[[Engine, list[Batch]], None]


@dataclass
class StepTimings:
    """Hold what this rank measured.

    Attributes:
        timed: Seconds of each timed step.
        profiled: Seconds of each part, for each profiled step.
        contents: Contents of all timed steps together, as ``count`` gave them.
        device: What the GPU did in the traced step, on the main process; None elsewhere.
        sent: Bytes that this rank sends in a step, by part.
        collectives: Collectives of a step, by part.
        device_memory: Bytes of tensors at the peak of a step.
        resting_memory: Bytes of tensors between two steps. A CPU has those of offloaded tensors among both.
        read_from_drives: Bytes that this process reads from drives in a timed step; the page cache is no drive.
    """

    timed: list[float] = field(default_factory=list)
    profiled: list[dict[str, float]] = field(default_factory=list)
    contents: Counter[str] = field(default_factory=Counter)
    device: DeviceTrace | None = None
    sent: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, float] = field(default_factory=dict)
    device_memory: float = 0.0
    resting_memory: float = 0.0
    read_from_drives: float = 0.0

    def parts(self) -> dict[str, float]:
        """Return the mean seconds of each part over the middle half of the profiled steps, ordered by duration.

        Means add up, and this half has no outliers.
        """
        ordered = sorted(self.profiled, key=lambda parts: sum(parts.values()))
        quarter = len(ordered) // 4
        middle = ordered[quarter : len(ordered) - quarter]
        return {name: statistics.fmean(parts[name] for parts in middle) for name in middle[0]}


def time_steps(
    engine: Engine,
    batches: Iterator[list[Batch]],
    steps: int,
    warmup: int,
    trace: Path | None,
    count: Callable[[list[Batch]], Counter[str]] | None = None,
    accumulate: Accumulate | None = None,
) -> StepTimings:
    """Warm up, time, count memory and profile. All ranks call it together.

    Args:
        engine: Engine to step.
        batches: This rank's micro-batches of each step.
        steps: Number of timed steps, and of profiled ones.
        warmup: Number of steps before them.
        trace: File for the profiler's trace of one more step; None writes none.
        count: Returns the contents of a timed step's micro-batches.
        accumulate: Adds the gradient of a step; None runs one micro-batch after the other.
    """
    step = _Step(engine, batches, accumulate or add_micro_batches)
    names = PARTS if accumulate is None else CONTRASTIVE_PARTS
    timings, now = StepTimings(), device_clock(engine.world)
    on_gpu = engine.world.device.type == "cuda"
    for _ in range(warmup):
        step()
    already_read = _read_bytes()
    for _ in range(steps):
        start = now()
        step_batches = step()
        timings.timed.append((now() - start) / 1e9)
        timings.contents += count(step_batches) if count else Counter()
    timings.read_from_drives = (_read_bytes() - already_read) / steps
    if on_gpu:
        timings.resting_memory = float(torch.cuda.memory_allocated(engine.world.device))
        timings.device_memory = device_memory(engine.world.device)
    else:
        with tensor_memory() as memory:
            timings.resting_memory = memory.current
            step()
        timings.device_memory = memory.peak
    clock = PartClock(now, DATA_WAIT)
    with parts_timed(engine, clock) as counted:
        for _ in range(steps):
            clock.lap()
            step(clock)
            spent = clock.lap()
            timings.profiled.append({name: spent[name] / 1e9 for name in names})
        timings.sent = {name: size / steps for name, size in counted.sent.items()}
        timings.collectives = {name: count / steps for name, count in counted.collectives.items()}
    if on_gpu:
        with TemporaryDirectory() as folder:
            path = trace or Path(folder) / "trace.json"
            _traced_step(step, path)
            timings.device = read_device_trace(path) if engine.world.is_main else None
    elif trace is not None:
        _traced_step(step, trace)
    return timings


def _read_bytes() -> int:
    """Return the bytes that this process has read from drives; 0 where the system does not count them."""
    counters = getattr(psutil.Process(), "io_counters", None)
    return 0 if counters is None else int(counters().read_bytes)


def _traced_step(step: _Step, path: Path) -> None:
    """Do one more step on all ranks; the main one writes its profiler's trace."""
    with torch.profiler.profile() if step.engine.world.is_main else nullcontext() as profiler:
        step()
    if profiler is not None:
        profiler.export_chrome_trace(str(path))


def add_micro_batches(engine: Engine, batches: list[Batch]) -> None:
    """Add the gradient of one micro-batch after the other."""
    for number, batch in enumerate(batches, start=1):
        inputs, is_last = batch.to(engine.world.device).inputs, number == len(batches)
        engine.forward_backward(inputs, 1.0 / max(1, batch.num_trained_tokens), is_last=is_last)


@dataclass(frozen=True)
class _Step:
    """Do a step, time its parts if there is a clock, and return its micro-batches.

    Attributes:
        engine: Engine to step.
        batches: Micro-batches of each step.
        accumulate: Adds the gradient of a step.
    """

    engine: Engine
    batches: Iterator[list[Batch]]
    accumulate: Accumulate

    def __call__(self, clock: PartClock | None = None) -> list[Batch]:
        part: Callable[[str], AbstractContextManager[None]] = clock.part if clock else lambda name: nullcontext()
        step_batches = next(self.batches)
        with part("backward"):  # the hooks of timed_parts open the model's forward inside it
            self.accumulate(self.engine, step_batches)
        with part("optimizer"):
            self.engine.step(1.0)
        return step_batches
