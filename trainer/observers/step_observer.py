"""Define what observes the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.data.batch import SampleId
from trainer.data.stream.step_totals import StepTotals
from trainer.deepspeed_engine.engine import Engine
from trainer.metrics.step_metrics import StepMetrics
from trainer.resilience.skipped_windows import SkippedWindow


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

    def measures(self, step: int) -> bool:
        """Return whether ``measure`` has something to add to a step; the same on every rank."""
        return False

    def measure(self, step: int, engine: Engine) -> Mapping[str, float]:
        """Return further metrics of a step that is done, by their names in metrics.jsonl; the same on every rank."""
        return {}

    def end(self, report: StepReport) -> None:
        """Take the report of a step."""

    def rewind(self, window: SkippedWindow) -> None:
        """Learn that training goes back to a checkpoint from before ``window``; the run folder knows it already."""

    def close(self) -> None:
        """Finish: training has ended, or starts again from a checkpoint."""
