"""Loss spikes, and the windows of updates that are passed over because of them.

Restarting from a checkpoint before the spike and skipping the data around it is what PaLM's authors did by hand
(arXiv:2204.02311, section 5.1). An update's number stays the number of its global batch: what is passed over leaves a
gap in what was trained, and moves nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.resilience_config import SpikeConfig
from trainer.runtime.files import write_json

WINDOWS = "skipped_windows.json"
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# A loss that hardly moves has a deviation near 0; a change below this share of its median is never called a spike's.
_LEAST_RELATIVE_DEVIATION = 0.01


@dataclass(frozen=True, order=True)
class SkippedWindow:
    """Updates ``first`` to ``last``, counted from 1 and inclusive, whose data are not trained on. why: for people."""

    first: int
    last: int
    why: str

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self.first <= step <= self.last


def read_windows(run_dir: Path) -> tuple[SkippedWindow, ...]:
    """The windows that the run's earlier rewinds left; none in a run that never had one."""
    try:
        text = (run_dir / WINDOWS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return windows_from_json(json.loads(text))


def write_windows(run_dir: Path, windows: Iterable[SkippedWindow]) -> None:
    """Replace the run's windows atomically."""
    write_json(run_dir / WINDOWS, windows_to_json(windows))


def windows_to_json(windows: Iterable[SkippedWindow]) -> list[dict[str, Any]]:
    """As they stand in the file and in a checkpoint's state."""
    return [asdict(window) for window in sorted(windows)]


def windows_from_json(values: Iterable[Mapping[str, Any]]) -> tuple[SkippedWindow, ...]:
    """What ``windows_to_json`` made."""
    return tuple(SkippedWindow(**value) for value in values)


class SpikeDetector:
    """Finds spikes in a series of updates; a function of the series alone, so that every rank finds the same.

    history: (loss, grad_norm) of applied updates that were not suspect, oldest first.
    """

    def __init__(self, config: SpikeConfig, history: Iterable[tuple[float, float]] = ()) -> None:
        self._config = config
        self._history: deque[tuple[float, float]] = deque(history, maxlen=config.window)
        self._suspects: list[tuple[int, float, float]] = []

    def record(self, step: int, loss: float, grad_norm: float) -> SkippedWindow | None:
        """Note an applied update; the window to pass over when it completes a spike."""
        if not self._is_suspect(loss, grad_norm):
            self._suspects.clear()
            self._history.append((loss, grad_norm))
            return None
        self._suspects.append((step, loss, grad_norm))
        if len(self._suspects) < self._config.patience:
            return None
        typical = statistics.median(past for past, _ in self._history)
        why = f"spike: loss {', '.join(f'{past:.4g}' for _, past, _ in self._suspects)} where {typical:.4g} was typical"
        return SkippedWindow(max(1, self._suspects[0][0] - self._config.skip_before), step, why)

    def accept(self) -> None:
        """The spike stays: judge what follows by it as well."""
        self._history.extend((loss, norm) for _, loss, norm in self._suspects)
        self._suspects.clear()

    def history(self) -> list[tuple[float, float]]:
        """For the next detector, in a checkpoint."""
        return list(self._history)

    def _is_suspect(self, loss: float, grad_norm: float) -> bool:
        if self._config.action == "off" or len(self._history) < self._config.min_steps:
            return False
        losses, norms = zip(*self._history, strict=True)
        scores = [robust_score(loss, losses)]
        if self._config.grad_norm:
            scores.append(robust_score(grad_norm, norms))
        return max(scores) > self._config.threshold


def robust_score(value: float, past: Iterable[float]) -> float:
    """Robust standard deviations that a value lies above the median of past ones; infinite when it is not finite."""
    if not math.isfinite(value):
        return math.inf
    past = list(past)
    median = statistics.median(past)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(one - median) for one in past)
    return (value - median) / max(deviation, _LEAST_RELATIVE_DEVIATION * abs(median), math.ulp(1.0))
