"""End a run once its evaluations have not got better for long enough."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trainer.checkpoint.retention import score_history
from trainer.config.run_config import RunConfig
from trainer.resilience.events import EventLog
from trainer.runtime.distributed import World, broadcast
from trainer.runtime.run_folder import RunFolder

_log = logging.getLogger(__name__)


class EarlyStopping:
    """Decide after each evaluation whether the run ends; the constructor is a collective if the run may end early.

    The evaluations before a resume are read from metrics.jsonl, so a resumed run ends at the same step.

    Args:
        config: Settings of the run.
        world: Processes of the run.
        events: Log of the run's events.
        resume_step: Last step that the checkpoint holds, 0 in a new run.
    """

    def __init__(self, config: RunConfig, world: World, events: EventLog, resume_step: int) -> None:
        self._metric, self._patience, self._events = config.checkpoint.best_metric, config.checkpoint.patience, events
        self._scores: dict[int, float] = {}
        if self._patience is not None:
            history = score_history(RunFolder(config.run_dir).metrics, self._metric) if world.is_main else {}
            history = broadcast(history, world)
            self._scores = {step: score for step, score in history.items() if step <= resume_step}

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        if self._patience is None or not self._scores:
            return False
        best = max(self._scores, key=lambda step: (self._scores[step], -step))
        return sum(step > best for step in self._scores) >= self._patience

    def ends_after(self, step: int, measured: Mapping[str, float]) -> bool:
        """Return whether the run ends after a step with these scores; the same on every rank."""
        if self._patience is None or self._metric not in measured:
            return False
        self._scores[step] = measured[self._metric]
        if self.is_over:
            best = max(self._scores.values())
            self._events.write("stopped_early", step, metric=self._metric, best=best, patience=self._patience)
            message = "training ends early after step %d: %s was not above %.4f in %d evaluations (checkpoint.patience)"
            _log.info(message, step, self._metric, best, self._patience)
        return self.is_over
