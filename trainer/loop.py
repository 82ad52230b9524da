"""Train from the newest checkpoint to the last step. Read this file from top to bottom.

A step visits every source, accumulates the weighted gradient, clips it once and steps the optimizer once (paper,
section 3.3). The loss is normalized over the global batch, so neither the number of processes nor that of micro-batches
changes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.checkpoint.changed_settings import changed_settings
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.load import check_fits, restore, resume_point
from trainer.checkpoint.rewind import drop_stale_checkpoints, has_checkpoint
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import TrainingState
from trainer.config.loader import config_to_yaml
from trainer.config.run_config import RunConfig
from trainer.data.batch import Batch, BatchFormat
from trainer.data.samples.rows import RowBuilder
from trainer.data.stream.loader import StepBatches, StepLoader
from trainer.data.stream.packing import LanePositions
from trainer.data.stream.step_totals import StepTotals, step_totals
from trainer.data.stream.stream_state import check_data_state, merge_lane_positions, saved_lane_positions
from trainer.deepspeed_engine.engine import Engine, StepResult
from trainer.deepspeed_engine.optimizer import learning_rate_factor
from trainer.deepspeed_engine.part_clipping import PartClipping
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.utilization import Operations, Utilization, UtilizationMeter
from trainer.observers.early_stopping import EarlyStopping
from trainer.observers.run_observers import run_observers
from trainer.observers.step_observer import StepObserver, StepReport
from trainer.resilience.events import EventLog
from trainer.resilience.pending_error import PendingError
from trainer.resilience.preemption import PreemptedError, Preemption
from trainer.resilience.skipped_windows import add_window, is_stale, known_windows
from trainer.resilience.stability import RewindError, Stability
from trainer.resilience.watchdog import Watchdog
from trainer.runtime.distributed import World, failing_together, gather_objects, sum_by_name
from trainer.runtime.files import write_atomically
from trainer.runtime.run_folder import RunFolder
from trainer.step_losses import LossScales, StepLosses

_log = logging.getLogger(__name__)

# Runs forward and backward of a step's micro-batches, each source's loss times its factor, and returns this rank's
# summed loss of each source that the step has, and its summed divergence (step_losses.PENALTY) if it has a penalty.
Accumulate = Callable[[Engine, Sequence[Batch], Mapping[str, float]], dict[str, Tensor]]
# Runs forward and backward of a micro-batch of a source; the last argument says whether it is the last one of the step.
MicroStep = Callable[[str, dict[str, Tensor], bool], dict[str, Tensor]]


def accumulate_micro_batches(
    engine: Engine, batches: Sequence[Batch], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Add the gradient of one micro-batch after the other: the loss of a row depends on no other row."""

    def micro_step(source: str, inputs: dict[str, Tensor], is_last: bool) -> dict[str, Tensor]:
        return {source: engine.forward_backward(inputs, factors[source], is_last=is_last)}

    return sum_micro_steps(engine, batches, micro_step)


def sum_micro_steps(engine: Engine, batches: Sequence[Batch], micro_step: MicroStep) -> dict[str, Tensor]:
    """Run one micro-step after the other, and return the sums of what they return, by name."""
    summed: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        found = micro_step(batch.source, batch.to(engine.world.device).inputs, number == len(batches))
        for name, value in found.items():
            summed[name] = summed[name] + value if name in summed else value
    return summed


@dataclass(frozen=True)
class Task:
    """Describe what is trained: all that differs between Flamingo, the language model and the contrastive towers.

    Attributes:
        module: ``module(**batch.inputs)`` returns an object with ``loss``, summed over the units of this rank.
        builders: Row builder of each source, by name.
        batch_format: What the module takes.
        deepspeed: DeepSpeed's json.
        model: Settings of the model, kept in every checkpoint and compared at resume.
        frozen: Digest of every tensor that no checkpoint holds, by name.
        unit: What ``token_mean`` counts: trained tokens, or documents where the loss is one of whole documents.
        operations: Counts the floating-point operations of a batch; None leaves them out of the metrics.
        peak_tflops: Peak of a device in 10^12 operations per second; None where it is not known.
        accumulate: Forward and backward of the micro-batches of a step.
        clip_parts: Parts of the module whose gradients are clipped by themselves.
        penalties: Weight of the divergence that ``accumulate`` returns of a source, by the source's name.
        measured_part: Returns the part of a parameter by its name, where the norms of parts are measured.
    """

    module: nn.Module
    builders: Mapping[str, RowBuilder]
    batch_format: BatchFormat
    deepspeed: dict[str, Any]
    model: Mapping[str, Any]
    frozen: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["token", "document"] = "token"
    operations: Callable[[Batch], Operations] | None = None
    peak_tflops: float | None = None
    accumulate: Accumulate = accumulate_micro_batches
    clip_parts: Sequence[PartClipping] = ()
    penalties: Mapping[str, float] = field(default_factory=dict)
    measured_part: Callable[[str], str] | None = None


@dataclass(frozen=True)
class _Run:
    """Hold what lives from the start of the process to its end, however often training goes back to a checkpoint."""

    task: Task
    config: RunConfig
    world: World
    folder: RunFolder
    engine: Engine
    meter: UtilizationMeter
    preemption: Preemption
    watchdog: Watchdog
    events: EventLog
    records: PendingError
    observers: Sequence[StepObserver]

    @property
    def sources(self) -> list[str]:
        return [source.name for source in self.config.data.sources]

    def learning_rate_factor(self, step_index: int) -> float:
        return learning_rate_factor(step_index, self.config.training.steps, self.config.schedule)


def train(task: Task, config: RunConfig, world: World, observers: Sequence[StepObserver] = ()) -> None:
    """Train to ``config.training.steps``, from the newest good checkpoint of ``config.run_dir`` if there is one.

    Args:
        task: What to train.
        config: Settings of the run.
        world: Processes of the run.
        observers: Observers beside the run's own; they are not closed at a rewind.

    Raises:
        CheckpointError: The checkpoint does not fit the run.
        RecordError: metrics.jsonl or a ledger cannot be written; other ranks raise RankFailedError.
        ValueError: The data do not fit.
        TrainingDivergedError: Too many steps were skipped, or the run went back too often.
        PreemptedError: A signal asked to stop; a checkpoint of the last step was saved.
    """
    torch.manual_seed(config.training.seed + world.rank)
    folder, preemption = RunFolder(config.run_dir), Preemption(world)
    matmul = config.training.cpu_matmul
    engine = Engine(
        task.module,
        config.optimizer,
        task.deepspeed,
        world,
        matmul,
        clip_parts=task.clip_parts,
        measured_part=task.measured_part,
        replicate_frozen=config.deepspeed.replicates_frozen,
    )
    events = EventLog(folder, world.is_main)
    watchdog = Watchdog(folder, config.resilience.watchdog, config.deepspeed.timeout_seconds, world, events)
    meter = UtilizationMeter(world, task.peak_tflops)
    records = PendingError(world)
    run = _Run(task, config, world, folder, engine, meter, preemption, watchdog, events, records, observers)
    with preemption.listening(), watchdog.watching(), ExitStack() as stack:
        for observer in observers:
            stack.enter_context(closing(observer))
        while True:
            try:
                return _train_from_checkpoint(run)
            except RewindError as rewind:  # from here on as after a kill
                add_window(folder, rewind.window, world)
                events.write("rewind", rewind.window.last, first=rewind.window.first, last=rewind.window.last)
                for observer in observers:
                    observer.rewind(rewind.window)


def _train_from_checkpoint(run: _Run) -> None:
    """Resume, then train to the last step; raises RewindError after a spike of the loss."""
    config, world, engine, watchdog = run.config, run.world, run.engine, run.watchdog
    watchdog.starting()
    windows = known_windows(run.folder, world)
    drop_stale_checkpoints(run.folder.checkpoints, lambda state: is_stale(state.step, state.stability, windows), world)
    state = _resume(run)
    stopping = EarlyStopping(config, world, run.events, state.step)
    if stopping.is_over:  # it was killed before its export
        return
    positions = saved_lane_positions(state.data)
    with failing_together(world):
        loader = step_loader(run.task, config, world, state.step, config.training.steps, positions)
        if state.step:
            check_data_state(state.data, loader.state(state.step))
        if world.is_main:
            write_atomically(run.folder.config, config_to_yaml(config))
    checkpoints = Checkpoints(run.folder.checkpoints, config.checkpoint, world, engine.shard_sizes())

    def can_go_back(step: int) -> bool:
        watchdog.alive("looking for a checkpoint to go back to", slow=True)
        checkpoints.wait()  # one that is being written counts, and none may be when the run goes back
        return has_checkpoint(run.folder.checkpoints, step, world)

    stability = Stability(config, windows=windows, saved=state.stability, can_go_back=can_go_back, events=run.events)
    with ExitStack() as stack:
        with failing_together(world):
            built = run_observers(
                config, world, resume_step=state.step, stability=stability, events=run.events, records=run.records
            )
            own = [stack.enter_context(closing(observer)) for observer in built]
        observers = [*own, *run.observers]
        for batches, data_seconds in _timed(loader):
            step = batches.step + 1
            watchdog.alive(f"step {step}")
            skip_reason = stability.skip_reason(step)
            for observer in observers:
                observer.begin(step, engine, skip_reason)
            if skip_reason is None:
                report = _train_step(run, batches, data_seconds)
            else:
                report = _skip_step(run, step, skip_reason, data_seconds)
            report = _measure(run, report)
            for observer in observers:
                observer.end(report)
            if report.record_failed:
                _end_with_record_error(run, checkpoints)
            checkpoints.poll()
            is_last = stopping.ends_after(step, report.metrics.measured) or step == config.training.steps
            if report.stop_requested or step % config.checkpoint.every == 0 or is_last:
                watchdog.alive(f"the checkpoint of step {step}", slow=True)
                run.records.raise_everywhere()  # no checkpoint may hold a step that is not recorded
                saved = _training_state(run, step, loader, stability)
                checkpoints.save(saved, config_to_yaml(config), engine.save)
            if report.stop_requested and not is_last:
                checkpoints.wait()
                run.events.write("preempted", step)
                raise PreemptedError(f"asked to stop: saved step {step} of {config.training.steps}; start it again")
            watchdog.step_done(step)
            if is_last:
                break
        watchdog.alive("the last checkpoint", slow=True)
        checkpoints.wait()


def _measure(run: _Run, report: StepReport) -> StepReport:
    """Add to the metrics of a step what observers measure after it, such as an evaluation of the model."""
    step = report.metrics.step
    due = [observer for observer in run.observers if observer.measures(step)]
    if not due:
        return report
    run.watchdog.alive(f"the evaluation after step {step}", slow=True)
    measured = {name: value for observer in due for name, value in observer.measure(step, run.engine).items()}
    return replace(report, metrics=replace(report.metrics, measured={**report.metrics.measured, **measured}))


def _end_with_record_error(run: _Run, checkpoints: Checkpoints) -> None:
    """Raise on all ranks; the checkpoint being written is completed before, if that is possible."""
    run.watchdog.alive("the checkpoint before the end", slow=True)
    with suppress(CheckpointError):
        checkpoints.wait()
    run.records.raise_everywhere()


def _resume(run: _Run) -> TrainingState:
    """Restore the engine's tensors and return the state to go on from; step 0 in a new run."""
    task, world = run.task, run.world
    found = resume_point(run.folder.checkpoints, world)
    if found is None:
        return TrainingState(0, world.size, {}, task.frozen, task.model)
    checkpoint, state = found
    check_fits(state, model=task.model, frozen=task.frozen, layout=run.engine.layout)
    restore(checkpoint, state, run.engine, world)
    run.events.write("resumed", state.step, world_size=world.size)
    _log.info("resumed %s at step %d of %d", checkpoint, state.step, run.config.training.steps)
    _report_changed_settings(run, checkpoint, state.step)
    return state


def _report_changed_settings(run: _Run, checkpoint: Path, step: int) -> None:
    """Tell which settings differ from those of the checkpoint; this run's hold. A collective."""
    changed: Mapping[str, tuple[Any, Any]] = {}
    with failing_together(run.world):
        if run.world.is_main:
            changed = changed_settings(checkpoint, config_to_yaml(run.config))
    if changed:
        settings = {name: {"old": old, "new": new} for name, (old, new) in changed.items()}
        run.events.write("settings_changed", step, settings=settings)
        text = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        _log.info("settings that differ from the checkpoint's: %s", text)


def _training_state(run: _Run, step: int, loader: StepLoader, stability: Stability) -> TrainingState:
    """Describe the run after ``step`` steps. A collective where sources are packed: each rank knows its own lanes."""
    positions = None
    if loader.lane_positions:
        positions = merge_lane_positions(gather_objects(loader.lane_positions, run.world))
    data = loader.state(step, positions)
    task, engine = run.task, run.engine
    return TrainingState(step, run.world.size, data, task.frozen, task.model, stability.state(), engine.layout)


def step_loader(
    task: Task,
    config: RunConfig,
    world: World,
    start_step: int,
    stop_step: int,
    lane_positions: Mapping[str, LanePositions] | None = None,
) -> StepLoader:
    """Build this rank's loader of the steps from ``start_step`` up to ``stop_step`` (exclusive).

    Args:
        task: What is trained.
        config: Settings of the run.
        world: Processes of the run.
        start_step: First step, counted from 0.
        stop_step: Step after the last one.
        lane_positions: Positions of packed lanes before ``start_step``, by source.

    Raises:
        ValueError: Settings do not fit.
        ShardError: Shards are missing, have changed or are damaged.
    """
    return StepLoader(
        config.data,
        task.builders,
        task.batch_format,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        stop_step=stop_step,
        pin_memory=world.device.type == "cuda",
        lane_positions=lane_positions,
        in_turn=config.training.combine == "round_robin",
    )


def _timed(loader: StepLoader) -> Iterator[tuple[StepBatches, float]]:
    """Yield each step with the seconds that training waited for it."""
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        batches = next(iterator, None)
        if batches is None:
            return
        yield batches, time.perf_counter() - start


def _train_step(run: _Run, batches: StepBatches, data_seconds: float) -> StepReport:
    """Train on one global batch."""
    start = time.perf_counter()
    totals = step_totals(batches.micro_batches, run.sources, data_seconds, run.world)
    scales = LossScales(totals, run.config, run.task.unit)
    sums = run.task.accumulate(run.engine, batches.micro_batches, scales.factors)
    result = run.engine.step(run.learning_rate_factor(batches.step))
    # Read only now: reading waits for the device.
    own = {f"loss/{name}": float(sums[name]) for name in sorted(sums)}
    own |= {f"square/{part}": square for part, square in result.part_squares.items()}
    step_seconds = time.perf_counter() - start + data_seconds
    operations = map(run.task.operations, batches.micro_batches) if run.task.operations else ()
    # Everything that the ranks tell one another after a step, in one all-reduce.
    summed = sum_by_name(_flags(run) | own | run.meter.pack(step_seconds, operations), run.world)
    by_source = {name: summed[f"loss/{name}"] for name in (*run.sources, *sums) if name in sums}
    losses = scales.read(by_source, run.task.penalties)
    norms = {f"grad_norm/{part}": summed[f"square/{part}"] ** 0.5 for part in result.part_squares}
    metrics = _step_metrics(run, batches.step, result, losses, totals, run.meter.unpack(summed))
    metrics = replace(metrics, measured={**norms, **losses.divergences})
    samples = [sample for batch in batches.micro_batches for sample in batch.samples] if result.applied else []
    return StepReport(metrics, totals, samples, data_seconds, summed["stop"] > 0, summed["record failed"] > 0)


def _flags(run: _Run) -> dict[str, float]:
    """Return what this rank tells the others after a step: whether it was asked to stop, or could not record a step."""
    return {"stop": float(run.preemption.requested), "record failed": float(run.records.exists)}


def _step_metrics(
    run: _Run,
    step_index: int,
    result: StepResult,
    losses: StepLosses,
    totals: StepTotals,
    utilization: Utilization,
) -> StepMetrics:
    replaced, dropped = Counter[str](), Counter[str]()
    for (_, reason), count in totals.replaced.items():
        replaced[reason] += count
    for (_, reason), count in totals.dropped_images.items():
        dropped[reason] += count
    return StepMetrics(
        step=step_index + 1,
        loss=losses.total,
        losses=losses.by_source,
        grad_norm=result.grad_norm,
        lr=run.config.optimizer.lr * run.learning_rate_factor(step_index),
        samples=totals.documents,
        tokens=totals.tokens,
        padding=totals.padding,
        images=totals.images,
        replaced=replaced,
        dropped_images=dropped,
        step_seconds=utilization.step_seconds,
        data_seconds=totals.data_seconds,
        step_skipped=not result.applied,
        utilization=utilization,
    )


def _skip_step(run: _Run, step: int, skip_reason: str, data_seconds: float) -> StepReport:
    """Pass over the data of a step without training on them."""
    nan = float("nan")
    metrics = StepMetrics(
        step=step,
        loss=nan,
        losses=dict.fromkeys(run.sources, nan),
        grad_norm=nan,
        lr=run.config.optimizer.lr * run.learning_rate_factor(step - 1),
        samples=dict.fromkeys(run.sources, 0),
        tokens=0,
        step_seconds=data_seconds,
        data_seconds=data_seconds,
        step_skipped=True,
        skip_reason=skip_reason,
    )
    flags = sum_by_name(_flags(run), run.world)
    return StepReport(metrics, None, [], data_seconds, flags["stop"] > 0, flags["record failed"] > 0)
