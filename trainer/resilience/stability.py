"""Whether training stays sound: updates that are not finite, spikes of the loss, and windows that are passed over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config.run_config import RunConfig
from trainer.errors import TrainerError
from trainer.resilience.events import EventLog
from trainer.resilience.spikes import (
    SkippedWindow,
    SpikeDetector,
    read_windows,
    windows_from_json,
    windows_to_json,
    write_windows,
)
from trainer.runtime.distributed import World, barrier, broadcast

_log = logging.getLogger(__name__)


class TrainingDivergedError(TrainerError):
    """Too many updates in a row were skipped, or the run went back too often."""


class RewindError(Exception):
    """Training has to go on from a checkpoint before ``window.first``; the loop does it."""

    def __init__(self, window: SkippedWindow) -> None:
        super().__init__(f"rewind to before update {window.first}")
        self.window = window


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


class Stability:
    """Watches the updates of a run, from one resume to the next. All ranks hold the same.

    windows: of ``known_windows``. saved: what ``state`` said when the checkpoint was written, empty in a new run.
    can_go_back: whether there is a checkpoint of at most that step, the same on all ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        windows: tuple[SkippedWindow, ...],
        saved: Mapping[str, Any],
        can_go_back: Callable[[int], bool],
        events: EventLog,
    ) -> None:
        self._config, self._can_go_back, self._events = config.resilience.spikes, can_go_back, events
        self._rewinds = sorted({*windows, *windows_from_json(saved.get("windows", ()))})
        by_setting = "resilience.skip_steps"
        self._windows = [
            *self._rewinds,
            *(SkippedWindow(first, last, by_setting) for first, last in config.resilience.skip_steps),
        ]
        self._not_finite = SkippedSteps(config.training.max_skipped_in_a_row, saved.get("not_finite_in_a_row", 0))
        self._detector = SpikeDetector(self._config, [(loss, norm) for loss, norm in saved.get("history", ())])

    def skip_reason(self, step: int) -> str | None:
        """Why update ``step`` is passed over; None for one that is trained."""
        return next((window.why for window in self._windows if step in window), None)

    def record(self, step: int, applied: bool, loss: float, grad_norm: float) -> None:
        """Note what update ``step`` did. Raises: TrainingDivergedError; RewindError when the run has to go back."""
        if not applied:
            self._events.write("skipped", step, why="loss or gradient not finite")
        self._not_finite.record(step, applied)
        window = self._detector.record(step, loss, grad_norm) if applied else None
        if window is None:
            return
        self._events.write("spike", step, **windows_to_json([window])[0])
        if self._config.action == "warn":
            _log.warning("%s; going on with it (resilience.spikes.action)", window.why)
        elif not self._can_go_back(window.first - 1):
            _log.warning("%s; no checkpoint from before update %d, so going on with it", window.why, window.first)
        elif len(self._rewinds) >= self._config.max_rewinds:
            raise TrainingDivergedError(
                f"{window.why}; the run went back {len(self._rewinds)} times already (resilience.spikes.max_rewinds): "
                "lower optimizer.lr, or look at the data of the windows in skipped_windows.json"
            )
        else:
            raise RewindError(window)
        self._detector.accept()

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "windows": windows_to_json(self._rewinds),
            "history": self._detector.history(),
            "not_finite_in_a_row": self._not_finite.in_a_row,
        }


def known_windows(run_dir: Path, world: World) -> tuple[SkippedWindow, ...]:
    """The windows of the run's rewinds, the same on every rank."""
    windows: tuple[SkippedWindow, ...] = broadcast(read_windows(run_dir) if world.is_main else None, world)
    return windows


def is_stale(step: int, saved: Mapping[str, Any], windows: tuple[SkippedWindow, ...]) -> bool:
    """Whether a checkpoint (its step, its ``Stability.state``) was trained on updates that were to be passed over."""
    known = windows_from_json(saved.get("windows", ()))
    return any(window.first <= step and window not in known for window in windows)


def add_window(run_dir: Path, window: SkippedWindow, world: World) -> None:
    """Note a rewind before anything is done about it: whatever is killed from now on, the next start goes back too."""
    if world.is_main:
        write_windows(run_dir, {*read_windows(run_dir), window})
    barrier()
