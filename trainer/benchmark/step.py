"""``python -m trainer.benchmark step CONFIG``: what an update of a run costs on these devices, and where the time goes.

Random weights, and made-up batches of the configuration's sizes: full rows of ``max_tokens``, each one sample with as
many media as the source allows, made before the clock runs. Or, with ``--data real``, the run's own model and data.
Three phases: warm-up; timed updates, in which nothing is measured but the wall clock between device-synchronized ends
of updates; and the same number of profiled ones, in which the device is synchronized at the border of each part.
Parts come from the profiled phase only. Each moment belongs to one of them, so they add up to the profiled update:

- data wait: until the next update's batches are on the device. vision, resampler: the modules' forward. language model:
  the rest of the forward. backward: with what is computed again. optimizer: the engine's step.
- gather (of partitioned parameters), reduce (of gradients and norms): while this process waits for a collective, the
  time until the slowest rank joins it included. They count there and not in the part that asked for them.

On a CPU a collective that runs beside the computing costs its part nothing but the waiting. On a GPU the profiled
updates let nothing overlap, so their sum exceeds the timed update by what overlap hides. One update more is traced
there: "exposed" is the time in which a collective or an offload transfer ran and nothing that computes, and the bytes
over the host link are those of its copies, the batches' included. A CPU has no such link.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from model.config import DType
from model.factory import torch_dtype
from model.flops import UsefulFlops, utilization
from model.parameters import full_shape
from trainer.benchmark.device_trace import DeviceTrace, read_device_trace
from trainer.benchmark.measurements import Measurement, header
from trainer.benchmark.step_memory import check_memory, limit_memory, tensor_memory
from trainer.benchmark.step_parts import GATHER, OUTERMOST, PARTS, REDUCE, PartClock, device_clock, parts_timed
from trainer.benchmark.synthetic import random_model, synthetic_batches
from trainer.config.loader import check_world_size, load_config, to_plain
from trainer.config.run_config import FlamingoRunConfig
from trainer.data.batch import Batch
from trainer.data.stream.step_plan import plan_step
from trainer.deepspeed_engine.engine import Engine
from trainer.entry import quiet_libraries
from trainer.errors import ConfigError
from trainer.loop import step_loader
from trainer.metrics.utilization import device_memory, host_memory
from trainer.runtime.device_memory import OutOfDeviceMemoryError, exhaustion_explained
from trainer.runtime.distributed import World, gather_objects, initialize, shut_down, sum_over_ranks
from trainer.tasks.batch_flops import count_operations, data_sheet_tflops
from trainer.tasks.flamingo import build_flamingo_task

BENCHMARK = "step"
LEAST_STEPS = 3
MIB = 2.0**20


@dataclass
class Timings:
    """Seconds of each timed update, and what this rank had in all of them; seconds of each part in each profiled one;
    bytes that this rank sends in one, by part; bytes of tensors at their peak; what a GPU did in one update more."""

    updates: list[float] = field(default_factory=list)
    profiled: list[dict[str, float]] = field(default_factory=list)
    contents: Counter[str] = field(default_factory=Counter)
    device: DeviceTrace | None = None
    sent: dict[str, float] = field(default_factory=dict)
    device_memory: float = 0.0

    def parts(self) -> dict[str, float]:
        """Means over the middle half of the profiled updates, by their duration: they add up, and outliers are out."""
        ordered = sorted(self.profiled, key=lambda parts: sum(parts.values()))
        quarter = len(ordered) // 4
        middle = ordered[quarter : len(ordered) - quarter]
        return {name: statistics.fmean(parts[name] for parts in middle) for name in PARTS}


def main(argv: Sequence[str]) -> int:
    """Entry point behind ``trainer.benchmark step``; returns the exit code: 2 for wrong arguments or settings, 1
    where a device's memory does not suffice."""
    options, overrides = _parse(argv)
    try:
        _check_options(options)
        config = load_config(options.config, overrides, FlamingoRunConfig, check_files=options.data == "real")
        quiet_libraries()
        world = initialize(config.deepspeed.timeout_seconds, config.training.threads)
        try:
            check_world_size(config, world.size)
            limit_memory(options.device_memory_gib, world)
            with exhaustion_explained():
                rows = _run(config, world, options)
        finally:
            shut_down()
    except (ConfigError, ValueError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except OutOfDeviceMemoryError as error:  # of any one process
        print(error, file=sys.stderr)
        return error.exit_code
    if world.is_main:
        for row in rows:
            print(f"{row.case:28s} {row.measure:36s} {row.value:12.5g} {row.unit}")
        if options.json is not None:
            device = "cuda" if world.device.type == "cuda" else "cpu"
            measured = {"benchmark": BENCHMARK, "processes": world.size, "data": options.data, "steps": options.steps}
            head = header(device) | measured | {"config": to_plain(config)}
            options.json.write_text(json.dumps([head, *(row.as_json() for row in rows)], indent=1) + "\n")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Raises: ValueError for what would be noticed only after the measuring, or not at all."""
    if options.steps < LEAST_STEPS or options.warmup < 1:
        raise ValueError(f"a median needs --steps {LEAST_STEPS} or more, and --warmup 1 or more")
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        raise ValueError(
            f"--peak-tflops {options.peak_tflops:g}: a device's peak is above 0; leave it out to measure it"
        )
    for name, path in (("--json", options.json), ("--trace", options.trace)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {path.absolute().parent}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.benchmark step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="a run's YAML; further --section.key VALUE change it")
    parser.add_argument("--steps", type=int, default=10, help=f"timed updates, at least {LEAST_STEPS}")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them, at least 1")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="default: synthetic")
    parser.add_argument("--peak-tflops", type=float, help="of a device; default: its data sheet, or a measured matmul")
    parser.add_argument("--device-memory-gib", type=float, help="allocate no more of a GPU, as on a smaller one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="torch profiler's trace of one more update")
    return parser.parse_known_args(argv)


def _run(config: FlamingoRunConfig, world: World, options: argparse.Namespace) -> list[Measurement]:
    updates: Iterator[list[Batch]]
    if options.data == "real":
        task = build_flamingo_task(config, world)
        engine = Engine(task.module, config.optimizer, task.deepspeed, world)
        drawn = options.warmup + 2 * options.steps + 2  # one to count memory, one to be traced
        updates = (update.micro_batches for update in step_loader(task, config, world, 0, drawn))
    else:
        plans = plan_step(config.data, world.size)
        check_memory(config, world)
        model, settings = random_model(config, world, sum(plan.micro_batches for plan in plans))
        engine = Engine(model, config.optimizer, settings, world)
        tower = model.vision_encoder
        made = [
            batch
            for plan in plans
            for batch in synthetic_batches(plan, model.tokens, tower.image_size, world.rank, tower.patch_size)
        ]
        updates = iter(lambda: made, None)
    model_module: Any = engine.module
    count = partial(_contents, UsefulFlops.of(model_module), model_module.language_model.checkpointed)
    timings = measure(engine, updates, options.steps, options.warmup, options.trace, count)
    return _rows(model_module, world, config, timings, options)


def measure(
    engine: Engine,
    updates: Iterator[list[Batch]],
    steps: int,
    warmup: int,
    trace: Path | None,
    count: Callable[[list[Batch]], Counter[str]] | None = None,
) -> Timings:
    """Warm up, time, profile; a collective. updates: this rank's micro-batches, update after update. count: what a
    timed update holds."""
    timings, now = Timings(), device_clock(engine.world)
    for number in range(warmup + steps):
        start = now()
        batches = _update(engine, updates)
        if number >= warmup:
            timings.updates.append((now() - start) / 1e9)
            timings.contents += count(batches) if count else Counter()
    if engine.world.device.type == "cuda":
        timings.device_memory = device_memory(engine.world.device)
    else:
        with tensor_memory() as memory:
            _update(engine, updates)
        timings.device_memory = memory.peak
    clock = PartClock(now, OUTERMOST)
    with parts_timed(engine, clock) as sent:
        for _ in range(steps):
            clock.lap()
            _update(engine, updates, clock)
            spent = clock.lap()
            timings.profiled.append({name: spent[name] / 1e9 for name in PARTS})
        timings.sent = {name: size / steps for name, size in sent.items()}
    if engine.world.device.type == "cuda":
        with TemporaryDirectory() as folder:
            path = trace or Path(folder) / "trace.json"
            _traced_step(engine, updates, path)
            timings.device = read_device_trace(path) if engine.world.is_main else None
    elif trace is not None:
        _traced_step(engine, updates, trace)
    return timings


def _traced_step(engine: Engine, updates: Iterator[list[Batch]], path: Path) -> None:
    """One update more on all ranks; the main one writes what its profiler saw."""
    with torch.profiler.profile() if engine.world.is_main else nullcontext() as profiler:
        _update(engine, updates)
    if profiler is not None:
        profiler.export_chrome_trace(str(path))


def _update(engine: Engine, updates: Iterator[list[Batch]], clock: PartClock | None = None) -> list[Batch]:
    """One update; its parts are timed where there is a clock for them. Returns what it trained on."""
    part: Callable[[str], AbstractContextManager[None]] = clock.part if clock else lambda name: nullcontext()
    batches = next(updates)
    for batch in batches:
        inputs = batch.to(engine.world.device).inputs
        with part("backward"):  # the model's forward is a part in this one
            engine.forward_backward(inputs, 1.0 / max(1, batch.trained_tokens))
    with part("optimizer"):
        engine.step(1.0)
    return batches


def _contents(sizes: UsefulFlops, recomputed: int, batches: list[Batch]) -> Counter[str]:
    """What an update holds on this rank, and the floating-point operations it takes. recomputed: blocks."""
    found: Counter[str] = Counter()
    for batch in batches:
        found["tokens"] += int(batch.attention_mask.sum())
        found["images"] += int(batch.media_index.max() >= 0) * batch.medium_count
        found["samples"] += batch.num_documents
        found["positions"] += batch.attention_mask.numel()
        operations = count_operations(sizes, recomputed, batch)
        found["useful"] += round(operations.useful)
        found["executed"] += round(operations.executed)
    return found


def _rows(
    model: nn.Module,
    world: World,
    config: FlamingoRunConfig,
    timings: Timings,
    options: argparse.Namespace,
) -> list[Measurement]:
    case = f"{world.size} x {world.device.type}, {config.training.dtype}"
    seconds = statistics.median(timings.updates)
    names = ("tokens", "images", "samples", "positions", "useful", "executed")
    summed = sum_over_ranks([timings.contents[name] / len(timings.updates) for name in names], world)
    held = dict(zip(names, summed, strict=True))
    source, peak = _peak(world, config.training.dtype, options.peak_tflops or config.logging.peak_tflops)
    found: list[tuple[str, str, float]] = [
        ("update, median", "s", seconds),
        ("update, fastest", "s", min(timings.updates)),
        ("update, slowest", "s", max(timings.updates)),
    ]
    for name in ("tokens", "images", "samples"):
        found += [
            (f"{name} per second, all", "1/s", held[name] / seconds),
            (f"{name} per second and device", "1/s", held[name] / seconds / world.size),
        ]
    parts = timings.parts()
    found += [(f"part: {name}", "s", parts[name]) for name in PARTS]
    found += [
        ("profiled update, sum of the parts", "s", sum(parts.values())),
        ("sent over the network, a device", "MiB", sum(timings.sent.values()) / MIB),
        ("of it to gather", "MiB", timings.sent.get(GATHER, 0.0) / MIB),
        ("of it to reduce", "MiB", timings.sent.get(REDUCE, 0.0) / MIB),
        *_device_rows(timings.device),
        ("parameters", "", _count(model.parameters())),
        ("of them trained", "", _count(parameter for parameter in model.parameters() if parameter.requires_grad)),
        ("MFU", "%", 100 * utilization(held["useful"], seconds, world.size, peak)),
        ("HFU", "%", 100 * utilization(held["executed"], seconds, world.size, peak)),
        (f"peak of a device, {source}", "TFLOP/s", peak / 1e12),
    ]
    if options.data == "real":
        found.append(("padding", "%", 100 * (1 - held["tokens"] / held["positions"])))
    memory = gather_objects((timings.device_memory, host_memory()), world)
    found += [
        ("peak memory of a device", "MiB", max(device for device, _ in memory) / MIB),
        ("peak memory of a process", "MiB", max(host for _, host in memory) / MIB),
    ]
    return [Measurement(BENCHMARK, case, measure, unit, value) for measure, unit, value in found]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(full_shape(parameter)) for parameter in parameters)


def _device_rows(traced: DeviceTrace | None) -> list[tuple[str, str, float]]:
    """What passed over the host link, and on a GPU what overlap did not hide."""
    if traced is None:
        return [("over the host link, a device", "MiB", 0.0)]
    return [
        ("over the host link, a device", "MiB", (traced.to_device + traced.to_host) / MIB),
        ("of it to the device", "MiB", traced.to_device / MIB),
        ("of it to the host", "MiB", traced.to_host / MIB),
        ("host link busy", "s", traced.link_seconds),
        *((f"exposed: {name}", "s", seconds) for name, seconds in traced.exposed.items()),
    ]


def _peak(world: World, dtype: DType, given: float | None) -> tuple[str, float]:
    """Where it comes from, and FLOP/s: of the command line, of the data sheet, or of two matrices' product."""
    if given is not None:
        return "given", 1e12 * given
    known = data_sheet_tflops(world.device, dtype)
    return ("data sheet", 1e12 * known) if known else ("measured", _measured_peak(world, torch_dtype(dtype)))


def _measured_peak(world: World, dtype: torch.dtype) -> float:
    now = device_clock(world)
    a, b = torch.randn(2, 2048, 2048, device=world.device).to(dtype).unbind()
    best = math.inf
    for _ in range(5):
        start = now()
        a @ b
        best = min(best, (now() - start) / 1e9)
    return 2 * 2048**3 / best
