"""Define observers of the steps of a run, and build those of every run: ledger, metrics, stability, stragglers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.config.run_config import RunConfig
from trainer.data.batch import SampleId
from trainer.data.stream.bad_sample_limit import BadSampleLimit
from trainer.data.stream.step_totals import StepTotals
from trainer.deepspeed_engine.engine import Engine
from trainer.metrics.ledger import LedgerWriter
from trainer.metrics.profiler_trace import ProfilerTrace
from trainer.metrics.sinks import MetricsWriter
from trainer.metrics.step_metrics import StepMetrics
from trainer.resilience.events import EventLog
from trainer.resilience.pending_error import PendingError
from trainer.resilience.skipped_windows import SkippedWindow
from trainer.resilience.stability import Stability
from trainer.resilience.stragglers import Stragglers
from trainer.runtime.distributed import World
from trainer.runtime.run_folder import RunFolder


@dataclass(frozen=True)
class StepReport:
    """Report one step to the observers.

    Attributes:
        metrics: Metrics over all ranks; ``metrics.step`` counts from 1.
        totals: Counts of the global batch; None for a step whose data were skipped.
        samples: Samples of this rank that an applied step consumed.
        data_seconds: Seconds that this rank waited for the data.
        stop_requested: Whether any rank was asked to stop.
        record_failed: Whether any rank could not record an earlier step.
    """

    metrics: StepMetrics
    totals: StepTotals | None
    samples: Sequence[SampleId]
    data_seconds: float
    stop_requested: bool
    record_failed: bool


class StepObserver:
    """Observe every step of a run. All ranks call the same observers in the same order, so they may use collectives."""

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        """Prepare for a step, counted from 1. ``skip_reason`` is set where its data are not trained on."""

    def end(self, report: StepReport) -> None:
        """Take the report of a step."""

    def rewind(self, window: SkippedWindow) -> None:
        """Learn that training goes back to a checkpoint from before ``window``; the run folder knows it already."""

    def close(self) -> None:
        """Finish: training has ended, or starts again from a checkpoint."""


def run_observers(
    config: RunConfig, world: World, *, resume_step: int, stability: Stability, events: EventLog, records: PendingError
) -> Iterator[StepObserver]:
    """Build the observers of every run, in the order in which they see a step.

    Args:
        config: Settings of the run.
        world: Processes of the run.
        resume_step: Last step that the checkpoint holds, 0 in a new run.
        stability: Judge of the steps.
        events: Log of the run's events.
        records: Keeps the error of a rank that cannot record a step.
    """
    folder = RunFolder(config.run_dir)
    ledger = LedgerWriter(folder, rank=world.rank, world_size=world.size, resume_step=resume_step)
    writer = MetricsWriter(
        folder,
        config.logging,
        total_steps=config.training.steps,
        is_main=world.is_main,
        resume_step=resume_step,
    )
    limit = BadSampleLimit(config.data)
    stragglers = Stragglers(config.resilience.stragglers, world, events)

    def write_ledger(report: StepReport) -> None:
        if config.data.ledger:
            records.attempt(lambda: ledger.write(report.metrics.step, report.samples))

    def write_metrics(report: StepReport) -> None:
        records.attempt(lambda: writer.write(report.metrics))

    def judge(report: StepReport) -> None:
        if report.totals is not None:
            step = report.metrics
            stability.record(step.step, applied=not step.step_skipped, loss=step.loss, grad_norm=step.grad_norm)
            limit.record(report.totals.samples, report.totals.replaced)

    yield _Observer(write_ledger, ledger.close)
    yield _Observer(write_metrics, writer.close)
    yield _Observer(judge)
    yield _Observer(lambda report: stragglers.record(report.metrics.step, report.data_seconds))
    yield _TraceObserver(ProfilerTrace(folder, config.logging.profile_steps, is_main=world.is_main))


@dataclass(frozen=True)
class _Observer(StepObserver):
    """Observe steps with functions."""

    on_end: Callable[[StepReport], None]
    on_close: Callable[[], None] = lambda: None

    def end(self, report: StepReport) -> None:
        self.on_end(report)

    def close(self) -> None:
        self.on_close()


@dataclass(frozen=True)
class _TraceObserver(StepObserver):
    trace: ProfilerTrace

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        self.trace.begin(step)

    def end(self, report: StepReport) -> None:
        self.trace.end(report.metrics.step)

    def close(self) -> None:
        self.trace.close()
