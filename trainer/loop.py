"""The training loop, to be read from top to bottom.

One update visits every source, accumulates its lambda-weighted gradient, clips once and steps once (paper, section
3.3). The loss is normalized over the global batch, so neither the number of processes nor of micro-steps changes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.checkpoint.load import check_fits, restore, resume_point
from trainer.checkpoint.rewind import drop_checkpoints, has_checkpoint
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.training_state import TrainingState
from trainer.config.loader import config_to_yaml
from trainer.config.run_config import RunConfig
from trainer.data.batch import Batch
from trainer.data.samples.row_builder import Builder
from trainer.data.stream.bad_sample_limit import BadSampleLimit
from trainer.data.stream.loader import StepLoader, Update
from trainer.data.stream.packing import LanePositions
from trainer.data.stream.step_totals import StepTotals, step_totals
from trainer.data.stream.stream_state import check_data_state, merge_lane_positions, saved_lane_positions
from trainer.deepspeed_engine.engine import Engine, StepResult
from trainer.deepspeed_engine.optimizer import learning_rate_factor
from trainer.metrics.ledger import LedgerWriter
from trainer.metrics.profiler_trace import ProfilerTrace
from trainer.metrics.sinks import MetricsWriter
from trainer.metrics.step_metrics import StepMetrics
from trainer.metrics.utilization import Operations, Utilization, UtilizationMeter
from trainer.resilience.events import EventLog
from trainer.resilience.preemption import PreemptedError, Preemption
from trainer.resilience.stability import RewindError, Stability, add_window, is_stale, known_windows
from trainer.resilience.stragglers import Stragglers
from trainer.resilience.watchdog import Watchdog
from trainer.runtime.distributed import World, gather_objects, sum_over_ranks
from trainer.runtime.files import write_atomically

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is trained: everything that differs between Flamingo, the language model and the contrastive towers.

    module: ``module(**batch.inputs)`` returns an object with ``loss``, summed over this rank's units.
    builders: for each source, what makes a sequence of a sample.
    pad_id, media_shape, patch_size: for collating; media_shape is [1, 3, height, width] of a dummy medium (sources of
        videos have more frames, by their own setting), patch_size the tower's, for sources with ``image_tokens``.
    operations: floating-point operations of a batch, and peak_tflops of a device, for the metrics; None: not known.
    unit: what ``token_mean`` counts: trained tokens, or sequences where the loss is one of whole sequences.
    deepspeed: the json for DeepSpeed. model: the model's settings, kept in every checkpoint and compared at resume.
    frozen: a digest of every tensor that no checkpoint holds; empty when everything is trained.
    """

    module: nn.Module
    builders: Mapping[str, Builder]
    pad_id: int
    media_shape: tuple[int, int, int, int]
    deepspeed: dict[str, Any]
    model: Mapping[str, Any]
    frozen: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["token", "document"] = "token"
    patch_size: int | None = None
    operations: Callable[[Batch], Operations] | None = None
    peak_tflops: float | None = None


@dataclass(frozen=True)
class _Run:
    """What stays from the start of a process to its end, however often training goes back to a checkpoint."""

    task: Task
    config: RunConfig
    world: World
    engine: Engine
    preemption: Preemption
    watchdog: Watchdog
    events: EventLog


def train(task: Task, config: RunConfig, world: World) -> None:
    """Train to ``config.training.steps``, from the newest good checkpoint of ``config.run_dir`` if there is one.

    Raises: CheckpointError when that checkpoint does not fit; ValueError for data that do not; TrainingDivergedError;
    PreemptedError after a signal, with a checkpoint of the update it came in.
    """
    torch.manual_seed(config.training.seed + world.rank)
    engine = Engine(task.module, config.optimizer, task.deepspeed, world)
    events, preemption = EventLog(config.run_dir, world.is_main), Preemption(world)
    watchdog = Watchdog(config.run_dir, config.resilience.watchdog, config.deepspeed.timeout_seconds, world, events)
    run = _Run(task, config, world, engine, preemption, watchdog, events)
    with preemption.listening(), watchdog.watching():
        while True:
            try:
                return _train_from_checkpoint(run)
            except RewindError as rewind:  # from here on as after a kill
                add_window(config.run_dir, rewind.window, world)
                events.write("rewind", rewind.window.last, first=rewind.window.first, last=rewind.window.last)


def _train_from_checkpoint(run: _Run) -> None:
    """Resume, then train. Raises: RewindError after a spike of the loss, to be started again; others as ``train``."""
    task, config, world, engine, watchdog = run.task, run.config, run.world, run.engine, run.watchdog
    watchdog.starting()
    folder, windows = checkpoint_folder(config), known_windows(config.run_dir, world)
    drop_checkpoints(folder, lambda state: is_stale(state.step, state.stability, windows), world)
    state = _resume(run)
    lane_positions = saved_lane_positions(state.data)
    loader = step_loader(task, config, world, state.step, config.training.steps, lane_positions)
    if state.step:
        check_data_state(state.data, loader.state(state.step))
    if world.is_main:
        write_atomically(config.run_dir / "config.yaml", config_to_yaml(config))
    checkpoints = Checkpoints(folder, config.checkpoint, world, engine.shard_sizes())

    def can_go_back(step: int) -> bool:
        watchdog.alive("looking for a checkpoint to go back to", slow=True)
        checkpoints.wait()  # one that is being written counts, and none is when the run goes back
        return has_checkpoint(folder, step, world)

    stability = Stability(config, windows, state.stability, can_go_back, run.events)
    limit, stragglers = BadSampleLimit(config.data), Stragglers(config.resilience.stragglers, world, run.events)
    meter = UtilizationMeter(world, task.peak_tflops)
    with (
        MetricsWriter(config.run_dir, config.logging, config.training.steps, world.is_main, state.step) as writer,
        closing(LedgerWriter(config.run_dir, world.rank, state.step, world.size)) as ledger,
        closing(ProfilerTrace(config.run_dir, config.logging.profile_steps, world.is_main)) as trace,
    ):
        for update, data_seconds in _timed(loader):
            done = update.step + 1
            watchdog.alive(f"update {done}")
            trace.begin(done)
            if (why := stability.skip_reason(done)) is not None:
                writer.write(_passed_over(done, why, config, data_seconds))
                stop = run.preemption.agreed()
            else:
                start = time.perf_counter()
                totals = step_totals(update.micro_batches, _sources(config), data_seconds, world)
                result, losses = _run_step(engine, update, totals, task, config)
                step_seconds = time.perf_counter() - start + data_seconds
                # Everything that the ranks tell one another after an update, at once.
                own = meter.own(step_seconds, map(task.operations, update.micro_batches) if task.operations else ())
                asked, *summed = sum_over_ranks([run.preemption.asked, *losses, *own], world)
                stop, speed = asked > 0, meter.unpack(summed[len(losses) :])
                if config.data.ledger and result.applied:
                    ledger.write(done, [sample for batch in update.micro_batches for sample in batch.samples])
                metrics = _metrics(update, result, summed[: len(losses)], totals, task, config, speed)
                writer.write(metrics)
                stability.record(done, result.applied, metrics.loss, metrics.grad_norm)
                limit.record(totals.samples, totals.replaced)
            trace.end(done)
            checkpoints.poll()
            if stop or done % config.checkpoint.every == 0 or done == config.training.steps:
                watchdog.alive(f"the checkpoint of update {done}", slow=True)
                data = _data_state(loader, done, world)
                state = TrainingState(done, world.size, data, task.frozen, task.model, stability.state())
                checkpoints.save(state, config_to_yaml(config), engine.save)
            if stop and done < config.training.steps:
                checkpoints.wait()
                run.events.write("preempted", done)
                raise PreemptedError(f"asked to stop: saved update {done} of {config.training.steps}; start it again")
            stragglers.record(done, data_seconds)
            watchdog.updated(done)
        watchdog.alive("the last checkpoint", slow=True)
        checkpoints.wait()


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return config.run_dir / "checkpoints"


def _resume(run: _Run) -> TrainingState:
    """The state to go on from, with the engine's tensors restored; step 0 in a new run."""
    task, config, world = run.task, run.config, run.world
    found = resume_point(checkpoint_folder(config), world)
    if found is None:
        return TrainingState(0, world.size, {}, task.frozen, task.model)
    checkpoint, state = found
    check_fits(state, model=task.model, frozen=task.frozen)
    restore(checkpoint, state, run.engine.load, run.engine.load_universal, world)
    run.events.write("resumed", state.step, world_size=world.size)
    _log.info("resumed %s at update %d of %d", checkpoint, state.step, config.training.steps)
    return state


def step_loader(
    task: Task,
    config: RunConfig,
    world: World,
    start_step: int,
    stop_step: int,
    lane_positions: Mapping[str, LanePositions] | None = None,
) -> StepLoader:
    """This rank's part of the updates from start_step up to stop_step (exclusive).

    lane_positions: of packed sources before start_step. Raises: ValueError and ShardError as ``StepLoader`` does.
    """
    return StepLoader(
        config.data,
        task.builders,
        pad_id=task.pad_id,
        media_shape=task.media_shape,
        patch_size=task.patch_size,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        stop_step=stop_step,
        pin_memory=world.device.type == "cuda",
        lane_positions=lane_positions,
    )


def _passed_over(step: int, why: str, config: RunConfig, data_seconds: float) -> StepMetrics:
    """What metrics.jsonl says of an update whose data are not trained on."""
    nothing = float("nan")
    losses = {source.name: nothing for source in config.data.sources}
    samples = dict.fromkeys(losses, 0)
    lr = config.optimizer.lr * learning_rate_factor(step - 1, config.training.steps, config.schedule)
    return StepMetrics(
        step, nothing, losses, nothing, lr, samples, 0, data_seconds, data_seconds, step_skipped=True, skip_reason=why
    )


def _data_state(loader: StepLoader, step: int, world: World) -> dict[str, Any]:
    """The place in the data after ``step`` updates. A collective where sources are packed: each rank has its lanes."""
    lanes = merge_lane_positions(gather_objects(loader.lane_positions, world)) if loader.lane_positions else None
    return loader.state(step, lanes)


def _timed(loader: StepLoader) -> Iterator[tuple[Update, float]]:
    """Each update with the seconds that training waited for it."""
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        update = next(iterator, None)
        if update is None:
            return
        yield update, time.perf_counter() - start


def _run_step(
    engine: Engine, update: Update, totals: StepTotals, task: Task, config: RunConfig
) -> tuple[StepResult, list[float]]:
    """Forward and backward of all micro-batches, then one step. Returns this rank's summed loss of each source."""
    normalizers = _normalizers(totals, task, config)
    weights = {source.name: source.weight for source in config.data.sources}
    summed: dict[str, Tensor] = {}
    for batch in update.micro_batches:
        scale = weights[batch.source] / normalizers[batch.source]
        loss = engine.forward_backward(batch.to(engine.world.device).inputs, scale)
        summed[batch.source] = summed[batch.source] + loss if batch.source in summed else loss
    result = engine.step(learning_rate_factor(update.step, config.training.steps, config.schedule))
    return result, [float(summed[source]) for source in _sources(config)]


def _sources(config: RunConfig) -> list[str]:
    return [source.name for source in config.data.sources]


def _normalizers(totals: StepTotals, task: Task, config: RunConfig) -> dict[str, int]:
    """What each source's summed loss is divided by: its trained tokens, or its sequences, in the global batch."""
    per_document = task.unit == "document" or config.training.loss_normalization == "token_sum"
    counts = totals.documents if per_document else totals.trained_tokens
    # A global batch without one trained token has the loss 0, not 0 / 0.
    return {source: max(1, count) for source, count in counts.items()}


def _metrics(
    update: Update,
    result: StepResult,
    summed_losses: list[float],
    totals: StepTotals,
    task: Task,
    config: RunConfig,
    speed: Utilization,
) -> StepMetrics:
    """What metrics.jsonl says of an update. summed_losses: of each source, over all ranks."""
    normalizers = _normalizers(totals, task, config)
    losses = {name: loss / normalizers[name] for name, loss in zip(_sources(config), summed_losses, strict=True)}
    reasons: Counter[str] = Counter()
    for (_, reason), count in totals.replaced.items():
        reasons[reason] += count
    return StepMetrics(
        step=update.step + 1,
        loss=sum(source.weight * losses[source.name] for source in config.data.sources),
        losses=losses,
        grad_norm=result.grad_norm,
        lr=config.optimizer.lr * learning_rate_factor(update.step, config.training.steps, config.schedule),
        samples=totals.documents,
        tokens=totals.tokens,
        padding=totals.padding,
        images=totals.images,
        replaced=reasons,
        step_seconds=speed.step_seconds,
        data_seconds=totals.data_seconds,
        step_skipped=not result.applied,
        speed=speed,
    )
