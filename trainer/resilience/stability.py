"""Updates that were skipped because a gradient was not finite: counted, and at some point too many."""

from __future__ import annotations

import logging

from trainer.errors import TrainerError

_log = logging.getLogger(__name__)


class TrainingDivergedError(TrainerError):
    """Too many updates in a row were skipped."""


class SkippedSteps:
    """Counts skipped updates; every rank counts the same, since the engine skips on all ranks alike.

    Raises: TrainingDivergedError from ``record`` at ``limit`` skipped updates one after another.
    """

    def __init__(self, limit: int, in_a_row: int = 0) -> None:
        self._limit = limit
        self.in_a_row = in_a_row

    def record(self, step: int, applied: bool) -> None:
        """Note whether update ``step`` was applied."""
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        _log.warning("update %d was skipped: loss or gradient not finite (%d in a row)", step, self.in_a_row)
        if self.in_a_row >= self._limit:
            raise TrainingDivergedError(
                f"{self.in_a_row} updates in a row had a non-finite gradient (training.max_skipped_in_a_row); "
                "lower optimizer.lr, train in float32, or look at the data of these steps"
            )
