"""React to steps with a non-finite gradient and to loss spikes, and skip windows of steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config.run_config import RunConfig
from trainer.errors import TrainerError
from trainer.resilience.events import EventLog
from trainer.resilience.skipped_windows import SkippedWindow, windows_from_json, windows_to_json
from trainer.resilience.spikes import SpikeDetector

_log = logging.getLogger(__name__)


class TrainingDivergedError(TrainerError):
    """Report too many non-finite steps in a row, or too many rewinds."""


class RewindError(Exception):
    """Request that training continues from a checkpoint before ``window.first``; the loop does so."""

    def __init__(self, window: SkippedWindow) -> None:
        super().__init__(f"rewind to before step {window.first}")
        self.window = window


class NonFiniteSteps:
    """Count consecutive steps with a non-finite gradient; the engine skips on all ranks alike, so all count the same.

    Args:
        limit: Number of consecutive non-finite steps that ends the run.
        in_a_row: Count to continue from.
    """

    def __init__(self, limit: int, in_a_row: int = 0) -> None:
        self._limit = limit
        self.in_a_row = in_a_row

    def record(self, step: int, applied: bool) -> None:
        """Record whether a step was applied.

        Raises:
            TrainingDivergedError: The limit is reached.
        """
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        _log.warning("step %d was skipped: loss or gradient not finite (%d in a row)", step, self.in_a_row)
        if self.in_a_row >= self._limit:
            raise TrainingDivergedError(
                f"{self.in_a_row} steps in a row had a non-finite gradient (training.max_skipped_in_a_row); "
                "lower optimizer.lr, train in float32, or look at the data of these steps"
            )


class Stability:
    """Watch the steps of a run from one resume to the next; all ranks hold the same state.

    Args:
        config: Settings of the run.
        windows: Windows of earlier rewinds (``known_windows``).
        saved: ``state()`` when the checkpoint was written; empty in a new run.
        can_go_back: Returns whether there is a checkpoint of at most the given step, the same on all ranks.
        events: Where to log skipped steps and spikes.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        windows: tuple[SkippedWindow, ...],
        saved: Mapping[str, Any],
        can_go_back: Callable[[int], bool],
        events: EventLog,
    ) -> None:
        self._config, self._can_go_back, self._events = config.resilience.spikes, can_go_back, events
        self._rewinds = sorted({*windows, *windows_from_json(saved.get("windows", ()))})
        configured = (
            SkippedWindow(first, last, "resilience.skip_steps") for first, last in config.resilience.skip_steps
        )
        self._windows = [*self._rewinds, *configured]
        self._non_finite = NonFiniteSteps(config.training.max_skipped_in_a_row, saved.get("non_finite_in_a_row", 0))
        self._detector = SpikeDetector(self._config, [(loss, norm) for loss, norm in saved.get("history", ())])

    def skip_reason(self, step: int) -> str | None:
        """Return why the data of a step are not trained on; None if they are."""
        return next((window.reason for window in self._windows if step in window), None)

    def record(self, step: int, *, applied: bool, loss: float, grad_norm: float) -> None:
        """Record the result of a step.

        Raises:
            TrainingDivergedError: Too many steps in a row were not finite, or the run went back too often.
            RewindError: The run must go back to before a spike.
        """
        if not applied:
            self._events.write("step_skipped", step, reason="loss or gradient not finite")
        self._non_finite.record(step, applied)
        window = self._detector.record(step, loss, grad_norm) if applied else None
        if window is None:
            return
        self._events.write("spike", step, **windows_to_json([window])[0])
        if self._config.action == "warn":
            _log.warning("%s; training continues with it (resilience.spikes.action)", window.reason)
        elif not self._can_go_back(window.first - 1):
            _log.warning(
                "%s; there is no checkpoint from before step %d, so training continues with it",
                window.reason,
                window.first,
            )
        elif len(self._rewinds) >= self._config.max_rewinds:
            raise TrainingDivergedError(
                f"{window.reason}; the run already went back {len(self._rewinds)} times "
                "(resilience.spikes.max_rewinds): lower optimizer.lr, or look at the data of the windows in "
                "skipped_windows.json"
            )
        else:
            raise RewindError(window)
        self._detector.accept()

    def state(self) -> dict[str, Any]:
        """Return the state to continue from, for a checkpoint."""
        return {
            "windows": windows_to_json(self._rewinds),
            "history": self._detector.history(),
            "non_finite_in_a_row": self._non_finite.in_a_row,
        }
