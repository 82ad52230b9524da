"""Build the observers of every run: ledger, metrics, stability, bad samples, stragglers, traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.config.run_config import RunConfig
from trainer.data.stream.bad_sample_limit import BadSampleLimit
from trainer.deepspeed_engine.engine import Engine, gathered_parameters
from trainer.deepspeed_engine.optimizer import learning_rate_factor
from trainer.metrics.gate_watch import GateWatch
from trainer.metrics.ledger import LedgerWriter
from trainer.metrics.profiler_trace import ProfilerTrace
from trainer.metrics.sinks import MetricsWriter
from trainer.observers.step_observer import StepObserver, StepReport
from trainer.resilience.events import EventLog
from trainer.resilience.pending_error import PendingError
from trainer.resilience.stability import Stability
from trainer.resilience.stragglers import Stragglers
from trainer.runtime.distributed import World
from trainer.runtime.run_folder import RunFolder


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

    def factor(step_index: int) -> float:
        return learning_rate_factor(step_index, config.training.steps, config.schedule)

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
    yield _GateObserver(GateWatch(gathered_parameters, config.training.steps, factor))


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


@dataclass(frozen=True)
class _GateObserver(StepObserver):
    watch: GateWatch

    def begin(self, step: int, engine: Engine, skip_reason: str | None) -> None:
        self.watch.look(step - 1, engine.module)
