"""``python -m trainer.benchmark step CONFIG``: what an update of a run costs on these devices, and where the time goes.

Random weights, and made-up batches of the configuration's sizes: rows of ``max_tokens`` with as many media as the
source allows, made before the clock runs, or with ``--data real`` the run's own. Three phases: warm-up; timed updates,
in which nothing is measured but the wall clock between device-synchronised ends of updates; and the same number of
profiled ones, in which the device is synchronised at the border of each part. Parts come from the profiled phase only:

- data wait: until the next update's batches are there. vision, resampler: around the modules. language model: the rest
  of the forward. backward: forward_backward less its forward. optimiser: the engine's step.

Collectives (gathers of partitioned parameters, reductions) and offload transfers lie inside of the parts; ``--trace``
shows them one by one. What they send is counted by DeepSpeed's comms logger.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.flops import UsefulFlops, Workload, utilisation
from model.tokens import SpecialTokenIds
from trainer.benchmarks.rows import Row, header
from trainer.config.loader import check_world_size, load_config, to_plain
from trainer.config.schema import FlamingoRunConfig
from trainer.cost_model import (
    DEVICES,
    ActivationMemory,
    checkpointed_blocks,
    executed_flops,
    expected_media,
    made_up_tokens,
    without_weights,
)
from trainer.data.batch import IGNORED_LABEL, Batch
from trainer.data.plan import SourcePlan, plan_update
from trainer.distributed import World, gather_objects, initialize, shut_down, sum_over_ranks
from trainer.engine import Engine, partitioned_loading
from trainer.errors import ConfigError
from trainer.tasks.flops import frames_per_medium, useful_flops

BENCHMARK = "step"
LEAST_STEPS = 3
PARTS = ("data wait", "vision", "resampler", "language model", "backward", "optimiser")
MIB = 2.0**20


@dataclass
class Timings:
    """Seconds of each timed update; of each part in each profiled one; bytes that this rank sends in one, by
    collective."""

    updates: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    sent: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Entry point behind ``trainer.benchmark step``; returns the exit code: 2 for wrong arguments or settings."""
    options, overrides = _parse(argv)
    try:
        if options.steps < LEAST_STEPS or options.warmup < 1:
            raise ValueError(f"a median needs --steps {LEAST_STEPS} or more, and --warmup 1 or more")
        config = load_config(options.config, overrides, FlamingoRunConfig, check_files=options.data == "real")
        world = initialize(config.deepspeed.timeout_seconds, config.training.threads)
        try:
            check_world_size(config, world.size)
            rows = _run(config, world, options)
        finally:
            shut_down()
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if world.is_main:
        for row in rows:
            print(f"{row.case:28s} {row.measure:36s} {row.value:12.5g} {row.unit}")
        if options.json is not None:
            device = "cuda" if world.device.type == "cuda" else "cpu"
            head = header(device) | {"benchmark": BENCHMARK, "processes": world.size, "config": to_plain(config)}
            options.json.write_text(json.dumps([head, *(row.as_json() for row in rows)], indent=1) + "\n")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark step", allow_abbrev=False)
    parser.add_argument("config", type=Path, help="a run's YAML; further --section.key VALUE change it")
    parser.add_argument("--steps", type=int, default=10, help=f"timed updates, at least {LEAST_STEPS}")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them, at least 1")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic")
    parser.add_argument("--peak-tflops", type=float, help="of a device; default: its data sheet, or a measured matmul")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="torch profiler's trace of one more update")
    return parser.parse_known_args(argv)


def _run(config: FlamingoRunConfig, world: World, options: argparse.Namespace) -> list[Row]:
    plans = plan_update(config.data, world.size)
    if options.data == "real":
        from trainer.tasks.flamingo import build_flamingo_task

        task = build_flamingo_task(config, world)
        engine = Engine(task.module, config.optimizer, task.deepspeed, world)
        updates = _real_updates(config, task, world, options)
    else:
        model, settings = _random_model(config, world, sum(plan.micro_batches for plan in plans))
        engine = Engine(model, config.optimizer, settings, world)
        size = model.vision_encoder.image_size
        made = [batch for plan in plans for batch in _made_up(plan, model.tokens, size, world.rank)]
        updates = iter(lambda: made, None)
    timings = measure(engine, updates, options.steps, options.warmup, options.trace)
    batches = next(updates)
    return _rows(engine.module, config, world, timings, batches, options.peak_tflops)


def _random_model(config: FlamingoRunConfig, world: World, micro_batches: int) -> tuple[Flamingo, dict[str, Any]]:
    from model import ops
    from trainer.config.deepspeed import deepspeed_json

    ops.set_backend(config.training.ops)
    settings = deepspeed_json(config, world_size=world.size, micro_batches_per_update=micro_batches)
    model_config = without_weights(config.model)
    with partitioned_loading(settings) as placement:
        model = build_flamingo(
            model_config,
            made_up_tokens(model_config),
            dtype=config.training.dtype,
            gather=placement.gather,
            partition=placement.partition,
        )
    plans = plan_update(config.data, world.size)
    model.activation_checkpointing(checkpointed_blocks(config, ActivationMemory(config, model), plans))
    return model, settings


def _real_updates(config: FlamingoRunConfig, task: Any, world: World, options: argparse.Namespace) -> Iterator[Any]:
    from trainer.data.loader import UpdateLoader

    loader = UpdateLoader(
        config.data,
        task.builders,
        pad_id=task.pad_id,
        media_shape=task.media_shape,
        patch_size=task.patch_size,
        rank=world.rank,
        world_size=world.size,
        start_step=0,
        stop_step=options.warmup + 2 * options.steps + 2,
        pin_memory=world.device.type == "cuda",
    )
    return (update.micro_batches for update in loader)


def _made_up(plan: SourcePlan, tokens: SpecialTokenIds, image_size: int, rank: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(rank)
    rows, length = plan.micro_batch_size, plan.source.max_tokens
    media, frames = expected_media(plan.source)
    for _ in range(plan.micro_batches):
        ids = torch.randint(3, tokens.image_id, (rows, length), generator=generator)
        index = torch.full_like(ids, -1)
        if media:
            within = torch.arange(length) * media // length
            index = within + media * torch.arange(rows)[:, None]
            ids[:, [-(-medium * length // media) for medium in range(media)]] = tokens.image_id
        labels = ids.masked_fill(ids == tokens.image_id, IGNORED_LABEL)
        shape = (max(1, rows * media), frames, 3, image_size, image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        yield Batch(plan.source.name, ids, torch.ones_like(ids), labels, index, pixels)


def measure(engine: Engine, updates: Iterator[list[Batch]], steps: int, warmup: int, trace: Path | None) -> Timings:
    """Warm up, time, profile; a collective. updates: this rank's micro-batches, update after update."""
    timings = Timings()
    for number in range(warmup + steps):
        start = _now(engine.world)
        _update(engine, next(updates))
        if number >= warmup:
            timings.updates.append(_now(engine.world) - start)
    with _parts_timed(engine, timings) as forward, _communication(engine.world, timings, steps):
        for _ in range(steps):
            _profiled_update(engine, updates, timings, forward)
    if trace is not None:
        _traced_update(engine, next(updates), trace)
    return timings


def _traced_update(engine: Engine, batches: list[Batch], path: Path) -> None:
    """One update more on all ranks; the main one writes what its profiler saw."""
    with torch.profiler.profile() if engine.world.is_main else nullcontext() as profiler:
        _update(engine, batches)
    if profiler is not None:
        profiler.export_chrome_trace(str(path))


def _update(engine: Engine, batches: list[Batch]) -> None:
    for batch in batches:
        engine.forward_backward(batch.to(engine.world.device).inputs, 1.0 / max(1, batch.trained_tokens))
    engine.step(1.0)


def _profiled_update(
    engine: Engine, updates: Iterator[list[Batch]], timings: Timings, forward: dict[str, float]
) -> None:
    world = engine.world
    forward.update(dict.fromkeys(forward, 0.0))
    start = _now(world)
    batches = next(updates)
    after_data = _now(world)
    for batch in batches:
        engine.forward_backward(batch.to(world.device).inputs, 1.0 / max(1, batch.trained_tokens))
    after_backward = _now(world)
    engine.step(1.0)
    seconds = {
        "data wait": after_data - start,
        "vision": forward["vision"],
        "resampler": forward["resampler"],
        "language model": forward["model"] - forward["vision"] - forward["resampler"],
        "backward": after_backward - after_data - forward["model"],
        "optimiser": _now(world) - after_backward,
    }
    for name, value in seconds.items():
        timings.parts[name].append(value)


@contextmanager
def _parts_timed(engine: Engine, timings: Timings) -> Iterator[dict[str, float]]:
    """Seconds spent in the forward of the model and of two of its parts, summed up while this is open."""
    model: Any = engine.module
    spent = {"vision": 0.0, "resampler": 0.0, "model": 0.0}
    started: dict[str, float] = {}
    handles = []
    for name, module in (("vision", model.vision_encoder), ("resampler", model.resampler), ("model", model)):

        def begin(module: nn.Module, arguments: Any, name: str = name) -> None:
            started[name] = _now(engine.world)

        def end(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
            spent[name] += _now(engine.world) - started[name]

        handles += [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _communication(world: World, timings: Timings, steps: int) -> Iterator[None]:
    """Fills in ``sent``, for one of ``steps`` updates, from what DeepSpeed sends while this is open."""
    import deepspeed
    from deepspeed.comm import comm

    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    comm.comms_logger.comms_dict.clear()
    try:
        yield
    finally:
        comm.comms_logger.enabled = False
    for operation, sizes in comm.comms_logger.comms_dict.items():
        for size, (count, *_) in sizes.items():
            sent = sent_bytes(operation, size, world.size) * count / steps
            timings.sent[operation] = timings.sent.get(operation, 0.0) + sent


def sent_bytes(operation: str, size: float, ranks: int) -> float:
    """What a rank sends in a ring: each shard of a gather or scatter passes all ranks but one.

    size: as DeepSpeed logs it: a shard for an all-gather, the whole for all others.
    """
    if operation.startswith(("all_gather", "allgather")):
        return size * (ranks - 1)
    if operation.startswith(("all_reduce", "inference_all_reduce")):
        return 2 * size * (ranks - 1) / ranks
    return size * (ranks - 1) / ranks


def _rows(
    model: Any,
    config: FlamingoRunConfig,
    world: World,
    timings: Timings,
    batches: list[Batch],
    peak_tflops: float | None,
) -> list[Row]:
    case = f"{world.size} x {world.device.type}, {config.training.dtype}"
    seconds = statistics.median(timings.updates)
    sizes = UsefulFlops.of(model)
    tokens, positions = (
        sum(int(batch.attention_mask.sum()) for batch in batches),
        sum(batch.attention_mask.numel() for batch in batches),
    )
    useful = sum(useful_flops(sizes, batch) for batch in batches)
    executed = sum(_executed_flops(sizes, batch, config) for batch in batches)
    counts = {
        "tokens": tokens,
        "images": sum(int(batch.media_index.max() >= 0) * batch.medium_count for batch in batches),
        "samples": sum(batch.sequences for batch in batches),
    }
    summed = sum_over_ranks([*counts.values(), useful, executed], world)
    peak = 1e12 * (peak_tflops or _peak_tflops(world.device, config.training.dtype))
    found: list[tuple[str, str, float]] = [
        ("update, median", "s", seconds),
        ("update, fastest", "s", min(timings.updates)),
        ("update, slowest", "s", max(timings.updates)),
    ]
    for name, total in zip(counts, summed, strict=False):
        found += [
            (f"{name} per second, all", "1/s", total / seconds),
            (f"{name} per second and device", "1/s", total / seconds / world.size),
        ]
    found += [(f"part: {name}", "s", statistics.median(timings.parts[name])) for name in PARTS]
    found += [
        ("sent over the network, a device", "MiB", sum(timings.sent.values()) / MIB),
        ("MFU", "%", 100 * utilisation(summed[3], seconds, world.size, peak)),
        ("HFU", "%", 100 * utilisation(summed[4], seconds, world.size, peak)),
        ("peak of a device", "TFLOP/s", peak / 1e12),
        ("padding", "%", 100 * (1 - tokens / positions)),
    ]
    memory = gather_objects((_device_memory(world.device), _host_memory()), world)
    found += [
        ("peak memory of a device", "MiB", max(device for device, _ in memory) / MIB),
        ("peak memory of a process", "MiB", max(host for _, host in memory) / MIB),
    ]
    return [Row(BENCHMARK, case, measure, unit, value) for measure, unit, value in found]


def _executed_flops(sizes: UsefulFlops, batch: Batch, config: FlamingoRunConfig) -> float:
    """FLOPs of all positions of a batch, with what is computed again."""
    rows, length = batch.input_ids.shape
    workload = Workload(rows, length, batch.medium_count / rows, frames_per_medium(sizes, batch))
    return rows * executed_flops(sizes, workload, config.training.activation_checkpointing)


def _peak_tflops(device: torch.device, dtype: str) -> float:
    """By the device's name in ``cost_model.DEVICES``; what is not there, and a CPU, multiplies two matrices."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
        for known in sorted(DEVICES, key=len, reverse=True):
            if known.split("-")[-1 if known.startswith("rtx") else 0] in name:
                return DEVICES[known].tflops
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a, b = torch.randn(2, 2048, 2048, device=device).to(kind).unbind()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e12


def _now(world: World) -> float:
    """The wall clock, after everything that was asked of the device."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def _device_memory(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def _host_memory() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
