"""Compute smoothed rates of training and the time that remains."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trainer.metrics.step_metrics import StepMetrics


@dataclass(frozen=True)
class Rates:
    """Hold rates over the last steps, summed over all ranks.

    Attributes:
        tokens: Tokens per second.
        samples: Samples per second.
        images: Images per second.
        data_fraction: Share of the time spent waiting for data.
        seconds_left: Seconds until the last step at this rate.
        mfu: Model FLOPs utilization, 0 to 1; None if not known.
    """

    tokens: float
    samples: float
    images: float
    data_fraction: float
    seconds_left: float
    mfu: float | None = None


class Throughput:
    """Average the rates over the last steps.

    The first step after a start counts only until the second one, since it includes compilation and allocation.

    Args:
        total_steps: Last step of the run.
        num_steps: Number of steps to average over.
    """

    def __init__(self, total_steps: int, num_steps: int = 50) -> None:
        self._total_steps = total_steps
        self._steps: deque[StepMetrics] = deque(maxlen=num_steps)
        self._first_is_warmup = True

    def add(self, metrics: StepMetrics) -> Rates:
        """Add a step and return the new rates."""
        if self._first_is_warmup and len(self._steps) == 1:
            self._steps.clear()
            self._first_is_warmup = False
        self._steps.append(metrics)
        seconds = max(sum(step.step_seconds for step in self._steps), 1e-9)
        return Rates(
            tokens=sum(step.tokens for step in self._steps) / seconds,
            samples=sum(sum(step.samples.values()) for step in self._steps) / seconds,
            images=sum(step.images for step in self._steps) / seconds,
            data_fraction=sum(step.data_seconds for step in self._steps) / seconds,
            seconds_left=seconds / len(self._steps) * max(0, self._total_steps - metrics.step),
            mfu=self._mfu(),
        )

    def _mfu(self) -> float | None:
        """Average the MFU of the steps that know theirs, weighted by duration."""
        used = [(step.utilization, step.step_seconds) for step in self._steps]
        known = [(utilization.mfu, seconds) for utilization, seconds in used if utilization and utilization.mfu]
        return sum(mfu * seconds for mfu, seconds in known) / sum(seconds for _, seconds in known) if known else None


def format_duration(seconds: float) -> str:
    """Format as "4s", "3m 20s", "2h 05m" or "3d 04h": two units at most."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def format_count(value: float) -> str:
    """Format with three digits: "950", "12.3k", "4.56M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
