"""Remember the windows of steps that a run skips after loss spikes (``skipped_windows.json`` of the run folder)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.runtime.distributed import World, broadcast, failing_together
from trainer.runtime.files import write_json
from trainer.runtime.run_folder import RunFolder


@dataclass(frozen=True, order=True)
class SkippedWindow:
    """Name consecutive steps whose data are not trained on; ``step in window`` tells whether a step is one of them.

    A step keeps the number of its global batch: skipped steps leave a gap in the training and move no other step.

    Attributes:
        first: First step, counted from 1.
        last: Last step, inclusive.
        reason: Reason for people to read.
    """

    first: int
    last: int
    reason: str

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self.first <= step <= self.last


def windows_to_json(windows: Iterable[SkippedWindow]) -> list[dict[str, Any]]:
    """Return the JSON value of windows, sorted, for the file and for a checkpoint's state."""
    return [asdict(window) for window in sorted(windows)]


def windows_from_json(values: Iterable[Mapping[str, Any]]) -> tuple[SkippedWindow, ...]:
    """Return the windows that ``windows_to_json`` wrote."""
    return tuple(SkippedWindow(**value) for value in values)


def read_windows(run_folder: RunFolder) -> tuple[SkippedWindow, ...]:
    """Read the windows of the run's earlier rewinds; none in a run without rewinds."""
    try:
        text = run_folder.skipped_windows.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return windows_from_json(json.loads(text))


def write_windows(run_folder: RunFolder, windows: Iterable[SkippedWindow]) -> None:
    """Replace the windows of the run atomically."""
    write_json(run_folder.skipped_windows, windows_to_json(windows))


def known_windows(run_folder: RunFolder, world: World) -> tuple[SkippedWindow, ...]:
    """Read the windows on rank 0 and return them on every rank; a collective."""
    windows: tuple[SkippedWindow, ...] = ()
    with failing_together(world):
        if world.is_main:
            windows = read_windows(run_folder)
    known: tuple[SkippedWindow, ...] = broadcast(windows, world)
    return known


def add_window(run_folder: RunFolder, window: SkippedWindow, world: World) -> None:
    """Record a window before the run goes back; a collective.

    After a kill at any later moment, the next start therefore goes back too.
    """
    with failing_together(world):
        if world.is_main:
            write_windows(run_folder, {*read_windows(run_folder), window})


def is_stale(step: int, saved: Mapping[str, Any], windows: tuple[SkippedWindow, ...]) -> bool:
    """Return whether a checkpoint was trained on steps that are now skipped.

    Args:
        step: Step of the checkpoint.
        saved: Its ``Stability.state``.
        windows: Windows of the run (``known_windows``).
    """
    known = windows_from_json(saved.get("windows", ()))
    return any(window.first <= step and window not in known for window in windows)
