"""Turn the timings of steps into the rows of ``trainer.benchmark step``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from model.config import DType
from model.factory import torch_dtype
from model.flops import UsefulFlops, utilization
from model.parameters import num_weights, trainable_parameters
from trainer.benchmark.device_trace import DeviceTrace
from trainer.benchmark.part_clock import GATHER, REDUCE, device_clock
from trainer.benchmark.result_file import Measurement
from trainer.benchmark.step_timings import StepTimings
from trainer.data.batch import Batch
from trainer.metrics.utilization import host_memory
from trainer.runtime.distributed import World, gather_objects, sum_over_ranks
from trainer.tasks.batch_flops import count_operations, data_sheet_tflops

BENCHMARK = "step"
_MIB = 2.0**20
_CONTENTS = ("tokens", "images", "samples", "positions", "useful", "executed")
_Values = Iterator[tuple[str, str, float]]  # measure, unit, value


def step_contents(sizes: UsefulFlops, recomputed: int, batches: list[Batch]) -> Counter[str]:
    """Count what a step on this rank holds, and the floating-point operations that it takes.

    Args:
        sizes: Sizes of the model.
        recomputed: Number of the language model's blocks that are recomputed.
        batches: Micro-batches of the step.
    """
    contents: Counter[str] = Counter()
    for batch in batches:
        contents["tokens"] += int(batch.attention_mask.sum())
        contents["images"] += batch.num_seen_media
        contents["samples"] += batch.num_documents
        contents["positions"] += batch.attention_mask.numel()
        operations = count_operations(sizes, recomputed, batch)
        contents["useful"] += round(operations.useful)
        contents["executed"] += round(operations.executed)
    return contents


def step_rows(
    model: nn.Module,
    world: World,
    dtype: DType,
    timings: StepTimings,
    *,
    real_data: bool,
    peak_tflops: float | None,
) -> list[Measurement]:
    """Return the rows. All ranks call it together.

    Args:
        model: The model that was stepped; it may be partitioned.
        world: The processes.
        dtype: Type that the model computes in.
        timings: What this rank measured, with contents from ``step_contents``.
        real_data: Whether the batches were real, so that their padding matters.
        peak_tflops: Peak of a device in 10^12 operations per second; None looks it up or measures it.
    """
    case = f"{world.size} x {world.device.type}, {dtype}"
    summed = sum_over_ranks([timings.contents[name] / len(timings.timed) for name in _CONTENTS], world)
    contents = dict(zip(_CONTENTS, summed, strict=True))
    values = [
        *_durations(timings),
        *_throughput(timings, contents, world.size),
        *_parts(timings),
        *_traffic(timings),
        *_model_size(model),
        *_utilization(timings, contents, world, dtype, peak_tflops),
    ]
    if real_data:
        values.append(("padding", "%", 100 * (1 - contents["tokens"] / contents["positions"])))
    memory = gather_objects((timings.device_memory, timings.resting_memory, host_memory()), world)
    names = ("peak memory of a device", "memory of a device between steps", "peak memory of a process")
    values += [(name, "MiB", max(found) / _MIB) for name, found in zip(names, zip(*memory, strict=True), strict=True)]
    return [Measurement(BENCHMARK, case, measure, unit, value) for measure, unit, value in values]


def _durations(timings: StepTimings) -> _Values:
    yield "step, median", "s", statistics.median(timings.timed)
    yield "step, fastest", "s", min(timings.timed)
    yield "step, slowest", "s", max(timings.timed)


def _throughput(timings: StepTimings, contents: dict[str, float], devices: int) -> _Values:
    seconds = statistics.median(timings.timed)
    for name in ("tokens", "images", "samples"):
        yield f"{name} per second", "1/s", contents[name] / seconds
        yield f"{name} per second and device", "1/s", contents[name] / seconds / devices


def _parts(timings: StepTimings) -> _Values:
    parts = timings.parts()
    for name, seconds in parts.items():
        yield f"part: {name}", "s", seconds
    yield "profiled step, sum of the parts", "s", sum(parts.values())


def _traffic(timings: StepTimings) -> _Values:
    yield "sent by a device", "MiB", sum(timings.sent.values()) / _MIB
    yield "sent by a device to gather", "MiB", timings.sent.get(GATHER, 0.0) / _MIB
    yield "sent by a device to reduce", "MiB", timings.sent.get(REDUCE, 0.0) / _MIB
    yield "collectives that gather", "", timings.collectives.get(GATHER, 0.0)
    yield "collectives that reduce", "", timings.collectives.get(REDUCE, 0.0)
    yield "read from drives", "MiB", timings.read_from_drives / _MIB
    yield from _device_trace(timings.device)


def _device_trace(traced: DeviceTrace | None) -> _Values:
    """Yield the traffic of the host link and, on a GPU, the communication that no computation hides."""
    if traced is None:
        yield "over the host link", "MiB", 0.0
        return
    yield "over the host link", "MiB", (traced.to_device + traced.to_host) / _MIB
    yield "over the host link to the device", "MiB", traced.to_device / _MIB
    yield "over the host link to the host", "MiB", traced.to_host / _MIB
    yield "host link busy", "s", traced.link_seconds
    for name, seconds in traced.exposed.items():
        yield f"exposed: {name}", "s", seconds


def _model_size(model: nn.Module) -> _Values:
    yield "parameters", "", num_weights(model.parameters())
    yield "trained parameters", "", num_weights(trainable_parameters(model).values())


def _utilization(
    timings: StepTimings, contents: dict[str, float], world: World, dtype: DType, peak_tflops: float | None
) -> _Values:
    """Yield model and hardware FLOPs utilization (PaLM, arXiv:2204.02311, appendix B), and the peak of a device."""
    seconds = statistics.median(timings.timed)
    origin, peak = _peak(world, dtype, peak_tflops)
    yield "MFU", "%", 100 * utilization(contents["useful"], seconds, world.size, peak)
    yield "HFU", "%", 100 * utilization(contents["executed"], seconds, world.size, peak)
    yield f"peak of a device, {origin}", "TFLOP/s", peak / 1e12


def _peak(world: World, dtype: DType, given_tflops: float | None) -> tuple[str, float]:
    """Return where the peak comes from, and its FLOP/s."""
    if given_tflops is not None:
        return "given", 1e12 * given_tflops
    known = data_sheet_tflops(world.device, dtype)
    return ("data sheet", 1e12 * known) if known else ("measured", _measured_peak(world, torch_dtype(dtype)))


def _measured_peak(world: World, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of five products of two matrices."""
    now = device_clock(world)
    a, b = torch.randn(2, 2048, 2048, device=world.device).to(dtype).unbind()
    best = math.inf
    for _ in range(5):
        start = now()
        a @ b
        best = min(best, (now() - start) / 1e9)
    return 2 * 2048**3 / best
