"""Detect spikes of the training loss.

PaLM's authors restarted by hand from a checkpoint before a spike and skipped the data around it (arXiv:2204.02311,
section 5.1). The trainer does both by itself: this module finds the spike, and the loop goes back and skips the window.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from trainer.config.resilience_config import SpikeConfig
from trainer.resilience.skipped_windows import SkippedWindow

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# An almost constant loss has a deviation near 0. The deviation counts as at least this share of the median, so that a
# tiny change is not taken for a spike.
_LEAST_RELATIVE_DEVIATION = 0.01


class SpikeDetector:
    """Find spikes in a series of steps; the result depends on the series alone and is the same on all ranks.

    Args:
        config: What counts as a spike.
        history: (loss, grad_norm) of applied steps that were not suspect, oldest first.
    """

    def __init__(self, config: SpikeConfig, history: Iterable[tuple[float, float]] = ()) -> None:
        self._config = config
        self._history: deque[tuple[float, float]] = deque(history, maxlen=config.window)
        self._suspects: list[tuple[int, float, float]] = []

    def record(self, step: int, loss: float, grad_norm: float) -> SkippedWindow | None:
        """Record an applied step and return the window to skip if the step completes a spike."""
        if not self._is_suspect(loss, grad_norm):
            self._suspects.clear()
            self._history.append((loss, grad_norm))
            return None
        self._suspects.append((step, loss, grad_norm))
        if len(self._suspects) < self._config.patience:
            return None
        typical = statistics.median(past for past, _ in self._history)
        losses = ", ".join(f"{past:.4g}" for _, past, _ in self._suspects)
        reason = f"spike: loss {losses} where {typical:.4g} was typical"
        return SkippedWindow(max(1, self._suspects[0][0] - self._config.skip_before), step, reason)

    def accept(self) -> None:
        """Keep the steps of the spike, and judge the following steps by them too."""
        self._history.extend((loss, norm) for _, loss, norm in self._suspects)
        self._suspects.clear()

    def history(self) -> list[tuple[float, float]]:
        """Return the history to continue from, for a checkpoint."""
        return list(self._history)

    def _is_suspect(self, loss: float, grad_norm: float) -> bool:
        if self._config.action == "off" or len(self._history) < self._config.min_steps:
            return False
        losses, norms = zip(*self._history, strict=True)
        scores = [robust_score(grad_norm, norms)] if self._config.grad_norm else []
        if not loss - statistics.median(losses) < self._config.min_rise:  # so that NaN is judged
            scores.append(robust_score(loss, losses))
        return max(scores, default=0.0) > self._config.threshold


def robust_score(value: float, past: Iterable[float]) -> float:
    """Return how many robust standard deviations a value lies above the median of past ones; infinite if not finite."""
    if not math.isfinite(value):
        return math.inf
    past = list(past)
    median = statistics.median(past)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(one - median) for one in past)
    return (value - median) / max(deviation, _LEAST_RELATIVE_DEVIATION * abs(median), math.ulp(1.0))
